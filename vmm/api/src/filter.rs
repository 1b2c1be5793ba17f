//! Filters for lists of VMs.

use serde::Deserialize;
use utoipa::IntoParams;

use samepage_api_types::lifecycle::State;
use samepage_host::record::Record;

/// Filters for a list of VMs. The list contains the VMs that match all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct VmFilter {
    /// VMs in this state.
    #[param(inline)]
    state: Option<State>,
    /// VMs of this group; `*` matches any text.
    group: Option<String>,
    /// VMs with this name; `*` matches any text, as in `web-*`.
    name: Option<String>,
}

impl VmFilter {
    /// Returns whether all VMs match.
    pub(super) fn is_all(&self) -> bool {
        *self == Self::default()
    }

    /// Returns whether a VM matches.
    pub(super) fn fits(&self, record: &Record) -> bool {
        let fits = |pattern: &Option<String>, text: &str| {
            pattern.as_deref().is_none_or(|pattern| fits_pattern(pattern, text))
        };
        self.state.is_none_or(|state| record.state() == state)
            && fits(&self.group, &record.spec().sharing.group)
            && fits(&self.name, record.name())
    }
}

/// Returns whether a text matches a pattern, in which each `*` stands for any letters. The time is
/// proportional to the text.
fn fits_pattern(pattern: &str, text: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(start) else { return false };
    let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    // Searching each part as early as possible never misses a match.
    for part in middle.split('*') {
        let Some(at) = text.find(part) else { return false };
        text = &text[at + part.len()..];
    }
    text.ends_with(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_letters() {
        for (pattern, text) in [
            ("web", "web"),
            ("*", ""),
            ("web-*", "web-12"),
            ("*-1", "web-1"),
            ("*eb*", "web-1"),
            ("w*b*1", "web-b-1"),
            ("**a**", "banana"),
            ("a*a", "aa"),
        ] {
            assert!(fits_pattern(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("web", "web-1"),
            ("", "a"),
            ("a*a", "a"),
            ("*x", "xy"),
            ("a*b*a", "aba-b"),
            ("*a*a*a*a*", "aaa"),
        ] {
            assert!(!fits_pattern(pattern, text), "{pattern} {text}");
        }
    }
}
