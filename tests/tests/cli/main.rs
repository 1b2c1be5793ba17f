//! The program as users see it: their input, its output, and what it leaves behind.

mod bad_input;
mod disks;
mod guests;
mod host;
mod scratch;
mod socket;
mod stats;
mod terminal;

use std::process::ExitCode;

use samepage_tests::harness::Need::{Kvm, Mounts};
use samepage_tests::harness::run_all;

fn main() -> ExitCode {
    run_all(&[
        ("help_names_every_option", &[], bad_input::help),
        ("wrong_usage_is_one_line_and_status_2", &[], bad_input::wrong_usage),
        ("what_cannot_be_run_is_one_line_and_status_1", &[], bad_input::refused),
        ("what_vms_cannot_be_built_from_is_one_line_and_status_1", &[Kvm], bad_input::not_built),
        ("a_host_without_kvm_is_told_how_to_get_it", &[Mounts], host::without_kvm),
        ("a_file_that_is_not_kvm_is_told_from_kvm", &[Mounts], host::not_kvm),
        ("a_user_who_may_not_use_kvm_is_told_how_to", &[Mounts], host::kvm_not_permitted),
        (
            "a_user_who_may_not_use_userfaultfd_runs_vms_unshared",
            &[Kvm, Mounts],
            host::userfaultfd_not_permitted,
        ),
        ("users_and_root_have_sockets_of_their_own_by_default", &[Kvm, Mounts], socket::of_users),
        ("run_opens_the_default_socket_if_asked_to", &[Kvm, Mounts], socket::of_run),
        ("a_process_with_too_few_files_is_told_its_limit", &[Kvm], host::too_few_files),
        ("a_guest_that_resets_ends_the_program_with_status_0", &[Kvm], guests::reset),
        ("guests_have_command_lines_and_consoles_of_their_own", &[Kvm], guests::templates),
        ("lines_of_several_guests_carry_their_names", &[Kvm], guests::prefixes),
        ("standard_input_is_the_guests_keyboard", &[Kvm], guests::keyboard),
        ("threads_are_named_after_their_vms", &[Kvm], guests::threads),
        ("a_crash_is_explained_and_ends_no_other_vm", &[Kvm], guests::crash),
        ("signals_end_guests_that_would_run_for_ever", &[Kvm], guests::signals),
        ("logs_that_are_renamed_or_cut_short_go_on", &[Kvm], guests::logs_are_rotated),
        ("readers_that_go_away_take_the_text_and_not_the_guest", &[Kvm], guests::readers_that_go_away),
        ("readers_that_stall_hold_no_end_up", &[Kvm], guests::readers_that_stall),
        ("more_memory_than_the_host_has_needs_overcommit", &[Kvm], guests::overcommit),
        ("what_a_guest_writes_is_in_its_image", &[Kvm], disks::written),
        ("a_read_only_disk_serves_several_guests_and_stays_as_it_is", &[Kvm], disks::read_only),
        ("a_vm_that_cannot_be_built_leaves_no_image", &[Kvm], disks::left_over),
        ("a_disk_in_use_is_refused_until_it_is_free", &[Kvm], disks::in_use),
        ("statistics_add_up_while_guests_share", &[Kvm], stats::while_sharing),
        ("statistics_tell_groups_and_modes", &[Kvm], stats::groups_and_modes),
        ("statistics_of_unshared_guests_count_their_own_memory", &[Kvm], stats::without_sharing),
        ("statistics_are_appended_to_and_the_audit_passes", &[Kvm], stats::appended),
        ("the_demo_saves_what_can_be_saved", &[Kvm], stats::demo),
        ("keys_go_to_the_guest_as_they_are", &[Kvm], terminal::keys),
        ("ctrl_a_h_helps_and_ctrl_a_x_ends", &[Kvm], terminal::commands),
        ("the_terminal_is_restored_after_a_crash", &[Kvm], terminal::crash),
        ("the_terminal_is_restored_after_a_signal", &[Kvm], terminal::signal),
        ("the_terminal_is_restored_after_an_error", &[Kvm], terminal::error),
        ("a_background_job_leaves_the_terminal_alone", &[Kvm], terminal::background),
        ("sighup_on_a_terminal_that_is_still_there_ends_nothing", &[Kvm], terminal::hangup),
        ("a_terminal_that_is_closed_ends_the_guest", &[Kvm], terminal::closed),
    ])
}
