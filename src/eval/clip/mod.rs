//! CLIP score: how well an image fits its prompt in the eyes of a CLIP model, 100 times the cosine of their embeddings.

mod files;
mod model;
mod pixels;
mod vision;

pub use files::ClipFiles;
pub(super) use files::named_files;
pub use model::ClipModel;
