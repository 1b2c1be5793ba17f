//! A balanced search tree of numbers whose order is somewhere else: in the contents of the pages that
//! the numbers stand for. A treap: heap-ordered by random priorities, so that its depth stays
//! logarithmic whatever comes in.
//!
//! Contents may change while their numbers are in the tree. A search may then miss what is there;
//! removal finds its number all the same, since it goes by the node and not by the order.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::collections::pieces::Pieces;
use crate::collections::segments::tree_bytes;

/// Index of a node, or [`NONE`].
type Link = u32;
const NONE: Link = Link::MAX;

#[derive(Clone, Copy, Debug)]
struct Node {
    key: u32,
    left: Link,
    right: Link,
    parent: Link,
}

/// The tree.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Pieces<Node>,
    /// Nodes that are free, to be used again.
    free: Vec<Link>,
    /// Where each number is.
    places: BTreeMap<u32, Link>,
    root: Link,
}

impl Default for Tree {
    fn default() -> Self {
        Self { nodes: Pieces::default(), free: Vec::new(), places: BTreeMap::new(), root: NONE }
    }
}

impl Tree {
    /// The number for which `order` says equal. `order` says how what is looked for compares with a
    /// number in the tree.
    pub(crate) fn find(&self, mut order: impl FnMut(u32) -> Ordering) -> Option<u32> {
        let mut at = self.root;
        while at != NONE {
            let node = self.node(at);
            at = match order(node.key) {
                Ordering::Less => node.left,
                Ordering::Greater => node.right,
                Ordering::Equal => return Some(node.key),
            };
        }
        None
    }

    /// Adds a number that is not in the tree.
    pub(crate) fn insert(&mut self, key: u32, mut order: impl FnMut(u32) -> Ordering) {
        let mut parent = NONE;
        let mut at = self.root;
        let mut left = false;
        while at != NONE {
            let node = self.node(at);
            parent = at;
            left = order(node.key) == Ordering::Less;
            at = if left { node.left } else { node.right };
        }
        let node = Node { key, left: NONE, right: NONE, parent };
        let link = match self.free.pop() {
            Some(link) => {
                self.nodes[link as usize] = node;
                link
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() as Link - 1
            }
        };
        let known = self.places.insert(key, link);
        debug_assert!(known.is_none(), "{key} is in the tree already");
        match parent {
            NONE => self.root = link,
            parent if left => self.nodes[parent as usize].left = link,
            parent => self.nodes[parent as usize].right = link,
        }
        while self.node(link).parent != NONE && priority(self.node(link).parent) < priority(link) {
            self.rotate_up(link);
        }
    }

    /// Takes a number out, if it is there.
    pub(crate) fn remove(&mut self, key: u32) {
        let Some(link) = self.places.remove(&key) else { return };
        let Node { left, right, parent, .. } = *self.node(link);
        let merged = self.merge(left, right);
        self.replace_child(parent, link, merged);
        self.free.push(link);
        if self.places.is_empty() {
            *self = Self::default();
        }
    }

    /// Bytes that the tree takes.
    pub(crate) fn bytes(&self) -> usize {
        self.nodes.bytes() + self.free.capacity() * size_of::<Link>() + tree_bytes(&self.places)
    }

    fn node(&self, link: Link) -> &Node {
        &self.nodes[link as usize]
    }

    /// Makes one tree of two, all of the one before all of the other. Returns its root.
    fn merge(&mut self, one: Link, other: Link) -> Link {
        if one == NONE {
            return other;
        }
        if other == NONE {
            return one;
        }
        if priority(one) > priority(other) {
            let right = self.merge(self.node(one).right, other);
            self.nodes[one as usize].right = right;
            self.nodes[right as usize].parent = one;
            one
        } else {
            let left = self.merge(one, self.node(other).left);
            self.nodes[other as usize].left = left;
            self.nodes[left as usize].parent = other;
            other
        }
    }

    fn replace_child(&mut self, parent: Link, old: Link, new: Link) {
        match parent {
            NONE => self.root = new,
            parent if self.node(parent).left == old => self.nodes[parent as usize].left = new,
            parent => self.nodes[parent as usize].right = new,
        }
        if new != NONE {
            self.nodes[new as usize].parent = parent;
        }
    }

    fn rotate_up(&mut self, link: Link) {
        let parent = self.node(link).parent;
        let grandparent = self.node(parent).parent;
        let inner = if self.node(parent).left == link {
            let inner = self.node(link).right;
            self.nodes[parent as usize].left = inner;
            self.nodes[link as usize].right = parent;
            inner
        } else {
            let inner = self.node(link).left;
            self.nodes[parent as usize].right = inner;
            self.nodes[link as usize].left = parent;
            inner
        };
        if inner != NONE {
            self.nodes[inner as usize].parent = parent;
        }
        self.replace_child(grandparent, parent, link);
        self.nodes[parent as usize].parent = link;
    }
}

/// A node's priority: as good as random, and nothing to keep.
fn priority(link: Link) -> u64 {
    u64::from(link)
        .wrapping_add(1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_left(29)
        .wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn depth(tree: &Tree, link: Link) -> usize {
        if link == NONE {
            return 0;
        }
        let node = tree.node(link);
        for child in [node.left, node.right].into_iter().filter(|&child| child != NONE) {
            assert_eq!(tree.node(child).parent, link);
            assert!(priority(child) <= priority(link));
        }
        1 + depth(tree, node.left).max(depth(tree, node.right))
    }

    proptest! {
        #[test]
        fn a_tree_is_a_set(changes in prop::collection::vec((any::<bool>(), 0..200_u32), 0..600)) {
            let mut tree = Tree::default();
            let mut model = BTreeSet::new();
            for (insert, key) in changes {
                if !insert {
                    model.remove(&key);
                    tree.remove(key);
                } else if model.insert(key) {
                    tree.insert(key, |other| key.cmp(&other));
                }
                depth(&tree, tree.root);
            }
            for key in 0..200_u32 {
                prop_assert_eq!(tree.find(|other| key.cmp(&other)), model.get(&key).copied());
            }
        }

        #[test]
        fn numbers_whose_contents_changed_can_be_removed(values in prop::collection::vec(0..50_u32, 1..200)) {
            let mut contents = values.clone();
            let mut tree = Tree::default();
            for key in 0..contents.len() as u32 {
                let value = contents[key as usize];
                tree.insert(key, |other| value.cmp(&contents[other as usize]));
            }
            contents.reverse();
            (0..contents.len() as u32).for_each(|key| tree.remove(key));
            prop_assert_eq!(tree.root, NONE);
            prop_assert_eq!(tree.bytes(), 0);
        }
    }

    #[test]
    fn sorted_input_makes_no_list_of_it() {
        let mut tree = Tree::default();
        (0..10_000_u32).for_each(|key| tree.insert(key, |other| key.cmp(&other)));
        assert!(depth(&tree, tree.root) < 60, "{}", depth(&tree, tree.root));
    }
}
