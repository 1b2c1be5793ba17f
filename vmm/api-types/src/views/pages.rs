//! What VMs' pages are used for, what of each use is shared, and memory as a picture.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::by_type::{ByType, TypeSample, present};
use samepage_spec::PAGE_SIZE;

/// Pages of one type, and what of them is shared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TypeView {
    /// Pages that are of this type.
    pub pages: u64,
    /// Of those, the ones that take memory of their own.
    pub pages_private: u64,
    /// The ones that are mapped to frames.
    pub pages_merged: u64,
    /// What sharing saves by them: each of n sharers of a frame saves 1 - 1/n of a page.
    pub pages_sharing: u64,
    /// The ones whose memory was freed, since they hold zeros or are free.
    pub zero_pages: u64,
    /// What pages of this type have in bytes.
    pub bytes: u64,
    /// What they take of the host by themselves.
    pub private_bytes: u64,
    /// What those on frames have in bytes, which they share with others or may come to.
    pub shared_bytes: u64,
    /// What sharing saves by them, pages whose memory was freed included.
    pub saved_bytes: u64,
    /// Memory of these that was freed, in bytes.
    pub zero_bytes: u64,
    /// Pages of this type that were mapped to frames, since an agent was first heard of.
    pub merges: u64,
    /// Those on frames that were written to and left them, since then.
    pub broken: u64,
    /// For how long pages of this type were on frames since then, in seconds, all pages together.
    pub merged_seconds: f64,
    /// How long that is, in seconds: of the VM whose agent has been heard of longest. 0 where there is nothing of
    /// this type.
    pub watched_seconds: f64,
    /// For how long a page of this type is shared before it is written to: `merged_seconds` over `broken`.
    /// Nothing before the first was written to, and where that is longer than `watched_seconds`.
    #[schema(required)]
    pub mean_life_seconds: Option<f64>,
}

impl From<TypeSample> for TypeView {
    fn from(sample: TypeSample) -> Self {
        let TypeSample {
            pages,
            pages_private,
            pages_merged,
            pages_sharing,
            zero_pages,
            merges,
            broken,
            merged_seconds,
            watched_seconds,
        } = sample;
        let bytes = |pages: u64| pages.saturating_mul(PAGE_SIZE as u64);
        Self {
            pages,
            pages_private,
            pages_merged,
            pages_sharing,
            zero_pages,
            bytes: bytes(pages),
            private_bytes: bytes(pages_private),
            shared_bytes: bytes(pages_merged),
            saved_bytes: bytes(sample.saved()),
            zero_bytes: bytes(zero_pages),
            merges,
            broken,
            merged_seconds,
            watched_seconds,
            mean_life_seconds: sample.mean_life_seconds(),
        }
    }
}

impl From<TypeView> for TypeSample {
    fn from(view: TypeView) -> Self {
        Self {
            pages: view.pages,
            pages_private: view.pages_private,
            pages_merged: view.pages_merged,
            pages_sharing: view.pages_sharing,
            zero_pages: view.zero_pages,
            merges: view.merges,
            broken: view.broken,
            merged_seconds: view.merged_seconds,
            watched_seconds: view.watched_seconds,
        }
    }
}

/// What a VM's pages are used for, as an agent in its guest says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmPagesView {
    /// When this was measured. Absent if the VM has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_seconds: Option<f64>,
    /// Whether an agent in the guest says what pages are used for. Where none does, all are of type
    /// `unknown`.
    pub publishing: bool,
    /// What the agent does; not there where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentView>,
    /// Free pages that were freed on the host since the VM was booted, in bytes.
    pub given_back_bytes: u64,
    /// Its pages by type; not there when the VM has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub types: Option<ByType<TypeView>>,
}

/// What an agent in a guest does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AgentView {
    /// Passes over the guest's pages that were taken in.
    pub passes: u64,
    /// Pages that had changed in them.
    pub changed_pages: u64,
    /// The guest's CPU time for its last pass, as it says.
    pub pass_cpu_seconds: f64,
}

/// What the pages of all VMs together are used for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PagesView {
    /// When this was measured.
    pub time_seconds: f64,
    /// VMs with memory.
    pub vms: u64,
    /// Those of them in whose guests an agent says what pages are used for. Pages of others are of type
    /// `unknown`.
    pub publishing: u64,
    /// Free pages that were freed on the host by VMs that have not ended, in bytes.
    pub given_back_bytes: u64,
    /// The pages by type.
    pub types: ByType<TypeView>,
}

/// A VM's memory as a picture, in the order of its pages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MapView {
    /// When this was measured. Absent if the VM has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_seconds: Option<f64>,
    /// Whether an agent in the guest says what pages are used for: then cells have `types`.
    pub publishing: bool,
    /// Runs of pages, of the same length but for the last. None when the VM has ended.
    pub cells: Vec<CellView>,
}

/// A run of pages, summed up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CellView {
    /// The number of its first page.
    pub first_page: u64,
    /// How many there are.
    pub pages: u32,
    /// How they are in memory.
    pub states: StatesView,
    /// What the guest uses them for: how many are of each type that there is. Not there where no agent says
    /// it.
    #[serde(default, with = "maybe_present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<std::collections::BTreeMap<String, u32>>)]
    pub types: Option<ByType<u32>>,
}

/// How pages are in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatesView {
    /// On frames, which they share with others or may come to.
    pub shared: u32,
    /// With memory of their own.
    pub private: u32,
    /// Given back, since they are of zeros or free.
    pub zero: u32,
    /// Never touched.
    pub absent: u32,
}

/// As JSON, what there is anything of, where anything is known.
mod maybe_present {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{ByType, present};

    pub(super) fn serialize<S: Serializer>(
        types: &Option<ByType<u32>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        struct Present<'a>(&'a ByType<u32>);
        impl Serialize for Present<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                present::serialize(self.0, serializer)
            }
        }
        types.as_ref().map(Present).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<ByType<u32>>, D::Error> {
        #[derive(Deserialize)]
        struct Present(#[serde(with = "present")] ByType<u32>);
        Ok(Option::<Present>::deserialize(deserializer)?.map(|Present(types)| types))
    }
}
