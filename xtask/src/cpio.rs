//! Archives of files for a kernel to unpack: cpio in the "newc" format
//! (`Documentation/driver-api/early-userspace/buffer-format.rst` in the kernel's source).

/// The mode of a folder.
pub(crate) const DIRECTORY: u32 = 0o040_755;
/// The mode of a file that everybody may run.
pub(crate) const PROGRAM: u32 = 0o100_755;
/// The mode of any other file.
pub(crate) const FILE: u32 = 0o100_644;
/// The mode of a device that is read and written as characters.
pub(crate) const CHARACTER_DEVICE: u32 = 0o020_600;

/// A cpio archive in the making. Owner is root, and all times are 0.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds an entry. Folders come before what they hold.
    pub(crate) fn add(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        self.header(self.entries, path, mode, device, content.len());
        self.bytes.extend(content);
        self.pad();
    }

    /// Ends the archive, and returns its bytes.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.header(0, "TRAILER!!!", 0, (0, 0), 0);
        self.bytes
    }

    fn header(&mut self, inode: u32, path: &str, mode: u32, (major, minor): (u32, u32), size: usize) {
        let links = if mode == DIRECTORY { 2 } else { 1 };
        // inode, mode, uid, gid, nlink, mtime, size, device (2), device number (2), name size, sum
        let fields = [inode, mode, 0, 0, links, 0, size as u32, 0, 0, major, minor, path.len() as u32 + 1, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Path, mode, device number and content.
    pub(crate) type Entry = (String, u32, (u32, u32), Vec<u8>);

    /// All entries of an archive.
    pub(crate) fn entries(mut bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        loop {
            let field = |index: usize| {
                let at = 6 + 8 * index;
                let digits = std::str::from_utf8(&bytes[at..at + 8]).expect("ASCII");
                u32::from_str_radix(digits, 16).expect("hexadecimal")
            };
            assert_eq!(&bytes[..6], b"070701");
            let (mode, size, device, name) =
                (field(1), field(6) as usize, (field(9), field(10)), field(11) as usize);
            let path = String::from_utf8(bytes[110..110 + name - 1].to_vec()).expect("UTF-8");
            let start = (110 + name).next_multiple_of(4);
            if path == "TRAILER!!!" {
                return entries;
            }
            entries.push((path, mode, device, bytes[start..start + size].to_vec()));
            bytes = &bytes[(start + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn entries_are_read_as_they_were_written() {
        let mut archive = Archive::default();
        archive.add("dev", DIRECTORY, (0, 0), &[]);
        archive.add("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
        archive.add("init", PROGRAM, (0, 0), b"12345");
        let expected: [Entry; 3] = [
            ("dev".into(), DIRECTORY, (0, 0), vec![]),
            ("dev/console".into(), CHARACTER_DEVICE, (5, 1), vec![]),
            ("init".into(), PROGRAM, (0, 0), b"12345".to_vec()),
        ];
        assert_eq!(entries(&archive.finish()), expected);
    }
}
