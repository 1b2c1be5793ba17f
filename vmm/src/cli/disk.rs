//! `--disk`: a virtual disk in one argument, of fields between commas.

use samepage_spec::{CachePolicy, DiskSpec, MAX_QUEUES, Size};
use samepage_text::names;
use samepage_text::size::parse_size;

use super::fields::{fields, parse_limit_field};

/// Returns the disk that an argument describes, before `{index}` and `{name}` are replaced in its path.
pub(super) fn parse_disk(text: &str) -> Result<DiskSpec, String> {
    let cache = Some(CachePolicy::default());
    let mut disk = DiskSpec { cache, queues: Some(1), ..DiskSpec::default() };
    for field in fields(text) {
        match field.split_once('=') {
            Some(("path", path)) if !path.is_empty() => disk.path = path.into(),
            Some(("id", id)) => {
                names::check_disk_id(id).map_err(|error| error.to_string())?;
                disk.id = Some(id.to_owned());
            }
            None if field == "readonly" => disk.readonly = true,
            Some(("readonly", "on")) => disk.readonly = true,
            Some(("readonly", "off")) => disk.readonly = false,
            Some(("format", format)) => disk.format = Some(format.parse()?),
            Some(("backing", path)) if !path.is_empty() => disk.backing = Some(path.into()),
            Some(("backing-format", format)) => disk.backing_format = Some(format.parse()?),
            None if field == "create" => disk.create = true,
            Some(("create", "on")) => disk.create = true,
            Some(("create", "off")) => disk.create = false,
            Some(("size", size)) => disk.size = Some(Size(parse_size(size)?)),
            Some(("cache", policy)) => disk.cache = Some(policy.parse()?),
            Some(("queues", count)) => match count.parse() {
                Ok(count) if (1..=MAX_QUEUES).contains(&count) => disk.queues = Some(count),
                _ => return Err(format!("{count:?} queues: a disk has 1 to {MAX_QUEUES}")),
            },
            Some((name, value)) if parse_limit_field(&mut disk.limits, name, value)? => {}
            _ => {
                return Err(format!(
                    "unknown field {field:?}; fields are path=FILE, readonly[=on|off], id=NAME, \
                     format=raw|qcow2, backing=FILE, backing-format=raw|qcow2, create[=on|off], size=BYTES, cache=POLICY, \
                     rate=BYTES, iops=N and queues=N (write a comma in a path twice)"
                ));
            }
        }
    }
    if disk.path.as_os_str().is_empty() { Err("path=FILE is missing".to_owned()) } else { Ok(disk) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use samepage_spec::{Format, RateLimits};

    #[test]
    fn disks_have_a_path_and_known_fields() {
        let disk = |path: &str, read_only, id: Option<&str>| {
            Ok(DiskSpec {
                path: path.into(),
                readonly: read_only,
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
            "path=a,backing=",
            "path=a,create=maybe",
            "path=a,create,size=big",
            "path=a,b",
            "path=a,id=",
            "",
        ] {
            assert!(parse_disk(wrong).is_err(), "{wrong}");
        }
        let overlay = parse_disk("path=a,backing=b,,c,backing-format=qcow2,create,size=2G").unwrap();
        assert_eq!((overlay.backing, overlay.create), (Some("b,c".into()), true));
        assert_eq!((overlay.backing_format, overlay.size), (Some(Format::Qcow2), Some(Size(2 << 30))));
        let all = parse_disk("path=a,format=qcow2,cache=exclusive,rate=10M/s,iops=500,queues=4").unwrap();
        let cache = Some(CachePolicy::Exclusive);
        assert_eq!((all.format, all.cache, all.queues), (Some(Format::Qcow2), cache, Some(4)));
        assert_eq!(all.limits, RateLimits { rate: Some(Size(10 << 20)), iops: Some(500) });
    }
}
