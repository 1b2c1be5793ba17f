//! Figures for each use that guests make of their pages, in the order and by the names of
//! [`PageType::ALL`].
//!
//! What a page is used for is what the guest says of it. Pages of which nothing is said are
//! [`PageType::Unknown`]; where no agent runs in a guest all are.

use std::ops::AddAssign;

use samepage_hole::PageType;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Something for each type of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ByType<T> {
    /// Nothing is said of them, or the kernel uses them for what has no flag.
    pub unknown: T,
    /// Memory of processes.
    pub anonymous: T,
    /// Content of files, mapped by processes.
    pub file_mapped: T,
    /// Content of files, in the page cache alone.
    pub file_unmapped: T,
    /// The kernel's small objects.
    pub slab: T,
    /// Tables of mappings.
    pub page_table: T,
    /// Several pages that belong together, for none of the other uses.
    pub compound: T,
    /// Free.
    pub free: T,
    /// Given to a balloon.
    pub balloon: T,
}

impl<T> ByType<T> {
    /// Of each in the order of [`PageType::ALL`].
    pub fn new(in_order: [T; 9]) -> Self {
        let [unknown, anonymous, file_mapped, file_unmapped, slab, page_table, compound, free, balloon] =
            in_order;
        Self { unknown, anonymous, file_mapped, file_unmapped, slab, page_table, compound, free, balloon }
    }

    /// Each, with its type.
    pub fn iter(&self) -> impl Iterator<Item = (PageType, &T)> {
        let Self {
            unknown,
            anonymous,
            file_mapped,
            file_unmapped,
            slab,
            page_table,
            compound,
            free,
            balloon,
        } = self;
        let in_order =
            [unknown, anonymous, file_mapped, file_unmapped, slab, page_table, compound, free, balloon];
        PageType::ALL.into_iter().zip(in_order)
    }

    /// Something else for each.
    pub fn map<U>(self, mut of: impl FnMut(T) -> U) -> ByType<U> {
        ByType {
            unknown: of(self.unknown),
            anonymous: of(self.anonymous),
            file_mapped: of(self.file_mapped),
            file_unmapped: of(self.file_unmapped),
            slab: of(self.slab),
            page_table: of(self.page_table),
            compound: of(self.compound),
            free: of(self.free),
            balloon: of(self.balloon),
        }
    }

    /// That of one type, by its name.
    pub fn by_name_mut(&mut self, name: &str) -> Option<&mut T> {
        Some(match name {
            "unknown" => &mut self.unknown,
            "anonymous" => &mut self.anonymous,
            "file_mapped" => &mut self.file_mapped,
            "file_unmapped" => &mut self.file_unmapped,
            "slab" => &mut self.slab,
            "page_table" => &mut self.page_table,
            "compound" => &mut self.compound,
            "free" => &mut self.free,
            "balloon" => &mut self.balloon,
            _ => return None,
        })
    }
}

impl<T: AddAssign + Copy> AddAssign for ByType<T> {
    fn add_assign(&mut self, other: Self) {
        self.unknown += other.unknown;
        self.anonymous += other.anonymous;
        self.file_mapped += other.file_mapped;
        self.file_unmapped += other.file_unmapped;
        self.slab += other.slab;
        self.page_table += other.page_table;
        self.compound += other.compound;
        self.free += other.free;
        self.balloon += other.balloon;
    }
}

/// As JSON, what there is anything of: other types are left out.
pub mod present {
    use std::collections::BTreeMap;

    use serde::de::{Deserialize, Deserializer};
    use serde::ser::{Serialize, Serializer};

    use super::ByType;

    /// Writes those that are not as by default.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<T, S>(types: &ByType<T>, serializer: S) -> Result<S::Ok, S::Error>
    where
        T: Serialize + Default + PartialEq,
        S: Serializer,
    {
        let nothing = T::default();
        let present = types.iter().filter(|(_, one)| **one != nothing);
        serializer.collect_map(present.map(|(page_type, one)| (page_type.name(), one)))
    }

    /// Reads them; what is not there is as by default, and of types that are not known nothing is kept.
    ///
    /// # Errors
    /// The deserializer's.
    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<ByType<T>, D::Error>
    where
        T: Deserialize<'de> + Default,
        D: Deserializer<'de>,
    {
        let mut types = ByType::default();
        for (name, one) in BTreeMap::<String, T>::deserialize(deserializer)? {
            if let Some(place) = types.by_name_mut(&name) {
                *place = one;
            }
        }
        Ok(types)
    }
}

/// Pages of one type, of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TypeSample {
    /// Pages that are of this type.
    pub pages: u64,
    /// Of those, the ones with memory of their own.
    pub pages_private: u64,
    /// The ones that are mapped to frames.
    pub pages_merged: u64,
    /// What sharing saves by them: each of n sharers of a frame saves 1 - 1/n of a page.
    pub pages_sharing: u64,
    /// The ones whose memory was freed.
    pub zero_pages: u64,
    /// Pages of this type that were mapped to frames, since an agent was first heard of.
    pub merges: u64,
    /// Merged pages of this type that were written to, since then.
    pub broken: u64,
    /// For how long pages of this type were merged since then, in seconds, all pages together.
    pub merged_seconds: f64,
    /// How long that is, in seconds: of the VM that was watched longest. 0 where there is nothing of the type, and
    /// where an older program wrote this.
    #[serde(default)]
    pub watched_seconds: f64,
}

impl TypeSample {
    /// For how long a page of this type is shared before it is written to, in seconds; `None` before the
    /// first was, and where it is longer than pages were watched. The likeliest figure where each moment is as
    /// likely as another to be the last: pages that are shared still count with the time so far.
    ///
    /// A figure beyond the time that was watched would say of it what nobody has seen: after three minutes, one
    /// write among ten thousand pages makes 21 days.
    #[must_use]
    pub fn mean_life_seconds(&self) -> Option<f64> {
        let mean = self.merged_seconds / self.broken as f64;
        (self.broken > 0 && mean <= self.watched_seconds).then_some(mean)
    }

    /// Pages that sharing saves, those of zeros included.
    #[must_use]
    pub fn saved(&self) -> u64 {
        self.pages_sharing.saturating_add(self.zero_pages)
    }
}

impl AddAssign for TypeSample {
    fn add_assign(&mut self, other: Self) {
        // Files of statistics may say anything.
        let add = |sum: &mut u64, other: u64| *sum = sum.saturating_add(other);
        add(&mut self.pages, other.pages);
        add(&mut self.pages_private, other.pages_private);
        add(&mut self.pages_merged, other.pages_merged);
        add(&mut self.pages_sharing, other.pages_sharing);
        add(&mut self.zero_pages, other.zero_pages);
        add(&mut self.merges, other.merges);
        add(&mut self.broken, other.broken);
        self.merged_seconds += other.merged_seconds;
        self.watched_seconds = self.watched_seconds.max(other.watched_seconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_type_has_its_place_and_name() {
        let numbers = ByType::new([0_u64, 1, 2, 3, 4, 5, 6, 7, 8]);
        let json = serde_json::to_value(numbers).unwrap();
        for ((page_type, number), wanted) in numbers.iter().zip(0..) {
            assert_eq!((*number, page_type), (wanted, PageType::ALL[wanted as usize]));
            assert_eq!(json[page_type.name()], wanted, "{json}");
        }
        assert_eq!(json.as_object().unwrap().len(), PageType::ALL.len());
        let mut doubled = numbers;
        doubled += numbers;
        assert!(doubled.iter().zip(0..).all(|((_, number), wanted)| *number == 2 * wanted));
        for page_type in PageType::ALL {
            assert!(doubled.by_name_mut(page_type.name()).is_some(), "{page_type:?}");
        }
    }

    #[test]
    fn what_there_is_nothing_of_is_left_out() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Cell {
            #[serde(with = "present")]
            types: ByType<u32>,
        }
        let cell = Cell { types: ByType { slab: 7, ..ByType::default() } };
        let text = serde_json::to_string(&cell).unwrap();
        assert_eq!(text, r#"{"types":{"slab":7}}"#);
        assert_eq!(serde_json::from_str::<Cell>(&text).unwrap(), cell);
        let newer = r#"{"types":{"slab":7,"of_tomorrow":3}}"#;
        assert_eq!(serde_json::from_str::<Cell>(newer).unwrap(), cell);
    }

    #[test]
    fn a_life_is_known_once_one_has_ended() {
        let mut sample = TypeSample { merged_seconds: 30.0, watched_seconds: 60.0, ..TypeSample::default() };
        assert_eq!(sample.mean_life_seconds(), None);
        sample +=
            TypeSample { broken: 4, merged_seconds: 10.0, watched_seconds: 5.0, ..TypeSample::default() };
        assert_eq!(sample.mean_life_seconds(), Some(10.0));
    }

    #[test]
    fn a_life_is_no_longer_than_it_was_watched_for() {
        let sample = TypeSample {
            broken: 5,
            // As 3,200 pages in three minutes.
            merged_seconds: 576_000.0,
            watched_seconds: 180.0,
            ..TypeSample::default()
        };
        assert_eq!(sample.mean_life_seconds(), None);
        assert_eq!(TypeSample { broken: 3200, ..sample }.mean_life_seconds(), Some(180.0));
    }
}
