//! `--disk`: a virtual disk in one argument, of fields between commas.

use samepage_devices::disk::limit::RateLimits;
use samepage_devices::disk::{CachePolicy, Format};
use samepage_devices::virtio::block::MAX_QUEUES;
use samepage_text::names;
use samepage_text::size::parse_size;

/// `--disk`, before `{index}` and `{name}` are replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskArg {
    pub(crate) path: String,
    pub(crate) read_only: bool,
    pub(crate) id: Option<String>,
    pub(crate) format: Option<Format>,
    pub(crate) cache: CachePolicy,
    pub(crate) limits: RateLimits,
    pub(crate) queues: usize,
}

pub(super) fn parse_disk(text: &str) -> Result<DiskArg, String> {
    let mut disk = DiskArg {
        path: String::new(),
        read_only: false,
        id: None,
        format: None,
        cache: CachePolicy::default(),
        limits: RateLimits::default(),
        queues: 1,
    };
    for field in fields(text) {
        match field.split_once('=') {
            Some(("path", path)) if !path.is_empty() => disk.path = path.to_owned(),
            Some(("id", id)) => {
                names::check_disk_id(id).map_err(|error| error.to_string())?;
                disk.id = Some(id.to_owned());
            }
            None if field == "readonly" => disk.read_only = true,
            Some(("readonly", "on")) => disk.read_only = true,
            Some(("readonly", "off")) => disk.read_only = false,
            Some(("format", format)) => disk.format = Some(format.parse()?),
            Some(("cache", policy)) => disk.cache = policy.parse()?,
            Some(("rate", rate)) => {
                disk.limits.bytes =
                    Some(parse_limit(rate, parse_size(rate.strip_suffix("/s").unwrap_or(rate)))?);
            }
            Some(("iops", rate)) => {
                let number = rate.parse().map_err(|_| "write a whole number".to_owned());
                disk.limits.operations = Some(parse_limit(rate, number)?);
            }
            Some(("queues", count)) => match count.parse() {
                Ok(count) if (1..=MAX_QUEUES).contains(&count) => disk.queues = count,
                _ => return Err(format!("{count:?} queues: a disk has 1 to {MAX_QUEUES}")),
            },
            _ => {
                return Err(format!(
                    "unknown field {field:?}; fields are path=FILE, readonly[=on|off], id=NAME, \
                     format=raw|qcow2, cache=POLICY, rate=BYTES, iops=N and queues=N (write a comma in a path twice)"
                ));
            }
        }
    }
    if disk.path.is_empty() { Err("path=FILE is missing".to_owned()) } else { Ok(disk) }
}

/// The fields between commas. A comma that is written twice stands for itself, as in QEMU's options.
fn fields(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            fields.push(String::new());
        } else if let Some(field) = fields.last_mut() {
            field.push(letter);
        }
    }
    fields
}

/// A limit for each second, of which something must be left.
fn parse_limit(text: &str, limit: Result<u64, String>) -> Result<u64, String> {
    match limit {
        Ok(0) => Err(format!("a limit of {text:?} lets nothing through")),
        Ok(limit) => Ok(limit),
        Err(reason) => Err(format!("a limit of {text:?}: {reason}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_have_a_path_and_known_fields() {
        let disk = |path: &str, read_only, id: Option<&str>| {
            Ok(DiskArg {
                path: path.into(),
                read_only,
                id: id.map(Into::into),
                ..parse_disk("path=x").unwrap()
            })
        };
        assert_eq!(parse_disk("path=a.img"), disk("a.img", false, None));
        assert_eq!(parse_disk("path=a=b.img,readonly,id=root"), disk("a=b.img", true, Some("root")));
        assert_eq!(parse_disk("path=a,readonly=on"), disk("a", true, None));
        assert_eq!(parse_disk("readonly=off,path=a"), disk("a", false, None));
        assert_eq!(parse_disk("path=a,,b,,,readonly"), disk("a,b,", true, None));
        assert_eq!(parse_disk("path=,,,,"), disk(",,", false, None));
        for wrong in [
            "a.img",
            "readonly",
            "path=",
            "path=a,rw",
            "path=a,cache=writeback",
            "path=a,format=vmdk",
            "path=a,rate=0",
            "path=a,iops=many",
            "path=a,queues=0",
            "path=a,queues=17",
            "path=a,readonly=yes",
            "path=a,",
            "path=a,b",
            "path=a,id=",
            "",
        ] {
            assert!(parse_disk(wrong).is_err(), "{wrong}");
        }
        let all = parse_disk("path=a,format=qcow2,cache=exclusive,rate=10M/s,iops=500,queues=4").unwrap();
        assert_eq!((all.format, all.cache, all.queues), (Some(Format::Qcow2), CachePolicy::Exclusive, 4));
        assert_eq!(all.limits, RateLimits { bytes: Some(10 << 20), operations: Some(500) });
    }
}
