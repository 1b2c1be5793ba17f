//! `--cloud-init`: the files for cloud-init in one argument, of fields between commas.

use samepage_spec::CloudInitSpec;

use super::fields::fields;

/// Returns the files that an argument names, before `{index}` and `{name}` are replaced in their paths.
pub(super) fn parse_cloud_init(text: &str) -> Result<CloudInitSpec, String> {
    let mut files = CloudInitSpec::default();
    for field in fields(text) {
        let (place, path) = match field.split_once('=') {
            Some(("user-data", path)) => (&mut files.user_data, path),
            Some(("meta-data", path)) => (&mut files.meta_data, path),
            Some(("network-config", path)) => (&mut files.network_config, path),
            Some(("ssh-key", path)) => (&mut files.ssh_key, path),
            _ => {
                return Err(format!(
                    "unknown field {field:?}; fields are user-data=FILE, meta-data=FILE, network-config=FILE and \
                     ssh-key=FILE (write a comma in a path twice)"
                ));
            }
        };
        if path.is_empty() || place.is_some() {
            return Err(format!("{field:?}: give one path, once"));
        }
        *place = Some(path.into());
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_is_named_once() {
        let files = parse_cloud_init("user-data=a,,b,ssh-key=k.pub").unwrap();
        assert_eq!((files.user_data, files.ssh_key), (Some("a,b".into()), Some("k.pub".into())));
        assert_eq!(files.meta_data, None);
        for wrong in ["", "a", "user-data=", "user-data=a,user-data=b", "user-data=a,", "keys=a"] {
            assert!(parse_cloud_init(wrong).is_err(), "{wrong}");
        }
    }
}
