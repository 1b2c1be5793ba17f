//! Which cached block goes first when memory is wanted.
