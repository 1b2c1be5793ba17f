//! Finds the PVH entry point in the notes of an ELF file.
//!
//! Sources: the System V ABI, chapter 5 (note sections); the PVH boot ABI (Xen's docs/misc/pvh.pandoc).

use super::ImageError;
use super::image::u32_at;

/// Length of the words before a note: lengths of name and content, and type.
const HEADER: usize = 12;
const OWNER: &[u8] = b"Xen\0";
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Returns the entry point in the notes of a segment with this alignment in bytes. The search ends at invalid
/// notes.
///
/// # Errors
/// Fails if the note is too short for an address.
pub(super) fn pvh_entry(mut notes: &[u8], alignment: u64) -> Result<Option<u64>, ImageError> {
    // 64-bit ELF files may align notes to 8 bytes, but rarely do.
    let alignment = if alignment == 8 { 8 } else { 4 };
    while let Some((header, rest)) = notes.split_at_checked(HEADER) {
        let [name_bytes, content_bytes] = [u32_at(header, 0), u32_at(header, 4)].map(|bytes| bytes as usize);
        // The content begins at the alignment, like the next note.
        let content_at = (HEADER + name_bytes).next_multiple_of(alignment) - HEADER;
        let Some(content) = rest.get(content_at..).and_then(|rest| rest.get(..content_bytes)) else { break };
        if u32_at(header, 8) == XEN_ELFNOTE_PHYS32_ENTRY && rest[..name_bytes] == *OWNER {
            let Some((address, _)) = content.split_first_chunk() else {
                return Err(ImageError::Malformed(format!(
                    "its PVH note has {content_bytes} bytes, and an address 4"
                )));
            };
            return Ok(Some(u32::from_le_bytes(*address).into()));
        }
        let next = (HEADER + content_at + content_bytes).next_multiple_of(alignment) - HEADER;
        notes = rest.get(next..).unwrap_or_default();
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn note(name: &[u8], content: &[u8], kind: u32, alignment: usize) -> Vec<u8> {
        let mut note: Vec<u8> = [name.len() as u32, content.len() as u32, kind]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        for part in [name, content] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(alignment), 0);
        }
        note
    }

    #[test]
    fn the_note_is_found_behind_others_of_either_alignment() {
        for alignment in [4, 8] {
            let others =
                [note(b"GNU\0", &[1; 20], 3, alignment), note(b"Linux\0", &[7], 18, alignment)].concat();
            let all = [others, note(OWNER, &[0, 0, 0x20, 0, 0, 0, 0, 0], 18, alignment)].concat();
            assert_eq!(pvh_entry(&all, alignment as u64).unwrap(), Some(0x20_0000));
        }
        assert_eq!(pvh_entry(&note(OWNER, &[0; 4], 17, 4), 4).unwrap(), None);
        assert!(pvh_entry(&note(OWNER, &[0; 3], 18, 4), 4).is_err());
        assert_eq!(pvh_entry(&[], 0).unwrap(), None);
    }

    proptest! {
        #[test]
        fn no_notes_lead_beyond_their_segment(
            mut words in prop::collection::vec(prop_oneof![any::<u32>(), 0_u32..40], 0..64),
            alignment in 0_u64..16,
        ) {
            let _ = pvh_entry(&words.drain(..).flat_map(u32::to_le_bytes).collect::<Vec<_>>(), alignment);
        }
    }
}
