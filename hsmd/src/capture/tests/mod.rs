//! Tests of capture as a whole, without the daemon: hints in any order, workers that are late, trees
//! that move meanwhile. See [`rig`].

mod compare;
mod doubt;
mod mover;
mod random;
mod rig;
