//! The scenes that the bundled model was trained on: their captions, drawn exactly, read off an image, and compared.

mod detect;
mod grammar;
mod judge;
mod render;
#[cfg(test)]
mod tests;

pub use detect::{Seen, detect};
pub use grammar::{Background, Colour, Layout, Object, Place, Relation, Scene, Shape};
pub use judge::{Verdict, judge};
pub use render::{Placed, render};
