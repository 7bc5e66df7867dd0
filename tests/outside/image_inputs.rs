//! Fill, Canny and Depth take an image as input, which is not built: every command that would draw with one says so before
//! any work, in its dry run too.

use std::{fs, path::Path};

use crate::{
    common::*,
    tensors::{read, write},
};

/// The golden pipeline with `columns` columns in `img_in`.
fn model(folder: &Path, columns: usize) {
    let to = folder.join("pipe");
    copy(Path::new(&golden("dev/pipe")), &to);
    let weights = "transformer/diffusion_pytorch_model.safetensors";
    let mut tensors = read(&format!("dev/pipe/{weights}"));
    let embedder = tensors.iter_mut().find(|t| t.0 == "x_embedder.weight");
    let (_, dtype, shape, data) = embedder.unwrap();
    shape[1] = columns;
    *data = vec![0; shape[0] * columns * dtype.bitsize() / 8];
    write(&to.join(weights), &tensors);
    let config = to.join("transformer/config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    json["out_channels"] = json["in_channels"].clone();
    json["in_channels"] = columns.into();
    fs::write(config, json.to_string()).unwrap();
}

#[test]
fn commands_that_would_draw_refuse_at_once() {
    for (columns, word) in [(128, "Canny"), (384, "Fill")] {
        let work = folder();
        let w = work.path();
        model(w, columns);
        fs::create_dir(w.join("images")).unwrap();
        for name in ["a", "b"] {
            fs::copy(
                golden("flux2/reference.png"),
                w.join(format!("images/{name}.png")),
            )
            .unwrap();
            fs::write(w.join(format!("images/{name}.txt")), "a house").unwrap();
        }
        let inspected = json(w, &["inspect", "--model", "pipe", "--json"]);
        assert!(inspected.to_string().contains(word), "{inspected}");
        for args in [
            &["calibrate", "--dry-run"][..],
            &["calibrate"],
            &["calibrate", "--images", "images"],
            &["calibrate", "--images", "images", "--dry-run"],
            &["prune", "--dry-run"],
            &["prune", "--images", "images"],
            &["score"],
            &["plan"],
            &["generate", "--prompt", "a"],
            &["generate", "--prompt", "a", "--image", "images/a.png"],
            &["eval", "--baseline", "pipe"],
        ] {
            let args = [args, &["--model", "pipe"]].concat();
            let said = columns.to_string();
            refused(w, &args, &["pipe", &said, "image as input", word]);
        }
    }
}
