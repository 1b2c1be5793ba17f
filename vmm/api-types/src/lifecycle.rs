//! What a VM can be asked for in which state: one table.
//!
//! A VM's state is never stored by the API: it is read off the VM itself, which may end at any moment.
//! The table therefore says what may be *asked*; that it came about is checked afterwards.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The state of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Created, and never started. The memory is reserved and the images are loaded.
    Created,
    /// The guest runs.
    Running,
    /// The guest is paused, and can be resumed.
    Paused,
    /// The VM has ended: the guest reset the machine or powered off, or the VM was killed. It holds no memory.
    Stopped,
    /// The guest crashed. The VM holds no memory.
    Crashed,
    /// An error of the host ended the VM. It holds no memory.
    Failed,
}

/// An action on a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Start a created VM, or boot an ended VM again.
    Start,
    /// Pause the guest. When the response arrives, its vCPUs have stopped.
    Pause,
    /// Resume a paused guest.
    Resume,
    /// End the machine, and boot again with the same configuration.
    Reset,
    /// Press Ctrl-Alt-Del on the guest's keyboard. The guest decides what follows.
    Shutdown,
    /// Press the power button, or Ctrl-Alt-Del if the guest has no driver for the button. Wait, and kill the VM if it
    /// does not end in time. A paused guest is resumed first.
    Stop,
    /// End the VM at once, without asking the guest.
    Kill,
}

/// Every state and where each action leads from it: start, pause, resume, reset, shutdown, stop, kill.
const TABLE: [(State, [Option<State>; 7]); 6] = {
    use State::{Crashed, Created, Failed, Paused, Running, Stopped};
    [
        (Created, [Some(Running), None, None, None, None, None, Some(Stopped)]),
        (Running, [None, Some(Paused), None, Some(Running), Some(Running), Some(Stopped), Some(Stopped)]),
        (Paused, [None, None, Some(Running), Some(Running), None, Some(Stopped), Some(Stopped)]),
        (Stopped, [Some(Running), None, None, None, None, None, None]),
        (Crashed, [Some(Running), None, None, None, None, None, None]),
        (Failed, [Some(Running), None, None, None, None, None, None]),
    ]
};

impl State {
    /// Every state.
    pub const ALL: [State; 6] =
        [State::Created, State::Running, State::Paused, State::Stopped, State::Crashed, State::Failed];

    /// The state in a word, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            State::Created => "created",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
            State::Crashed => "crashed",
            State::Failed => "failed",
        }
    }

    /// Where an action leads from here; `None` where it may not be asked for.
    #[must_use]
    pub fn after(self, action: Action) -> Option<State> {
        TABLE.iter().find(|(state, _)| *state == self).and_then(|(_, next)| next[action as usize])
    }

    /// The actions that may be asked for.
    pub fn actions(self) -> impl Iterator<Item = Action> {
        Action::ALL.into_iter().filter(move |action| self.after(*action).is_some())
    }
}

impl Action {
    /// Every action, in the order of the table's columns.
    pub const ALL: [Action; 7] = [
        Action::Start,
        Action::Pause,
        Action::Resume,
        Action::Reset,
        Action::Shutdown,
        Action::Stop,
        Action::Kill,
    ];

    /// The action in a word, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Action::Start => "start",
            Action::Pause => "pause",
            Action::Resume => "resume",
            Action::Reset => "reset",
            Action::Shutdown => "shutdown",
            Action::Stop => "stop",
            Action::Kill => "kill",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_its_line_and_every_action_its_column() {
        for (line, state) in TABLE.iter().zip(State::ALL) {
            assert_eq!(line.0, state);
        }
        for (column, action) in Action::ALL.into_iter().enumerate() {
            assert_eq!(action as usize, column);
        }
    }

    #[test]
    fn every_state_can_be_left_and_running_vms_can_be_killed() {
        for state in State::ALL {
            assert!(state.actions().count() > 0, "{state:?}");
        }
        assert_eq!(State::Running.after(Action::Start), None);
        assert_eq!(State::Paused.after(Action::Resume), Some(State::Running));
        assert_eq!(State::Stopped.after(Action::Kill), None);
        // Who is held cannot end by itself; for a stop it goes on.
        assert_eq!(State::Paused.after(Action::Shutdown), None);
        assert_eq!(State::Paused.after(Action::Stop), Some(State::Stopped));
    }

    /// The table in the documentation says what the code does.
    #[test]
    fn the_documentation_has_the_same_table() {
        let docs = include_str!("../../../docs/api.md");
        for state in State::ALL {
            let cells = Action::ALL.map(|action| state.after(action).map_or("-", State::name));
            let line = format!("| {} | {} |", state.name(), cells.join(" | "));
            assert!(docs.contains(&line), "docs/api.md lacks the line: {line}");
        }
    }
}
