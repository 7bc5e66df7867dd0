//! `bench` from the outside.

use std::path::Path;

use serde_json::Value;

use crate::{common::*, evaluation::number};

#[test]
fn bench_times_steps_and_blocks() {
    let work = folder();
    let w = work.path();
    quick_prune(
        w,
        "small",
        &["--blocks", "double.00-03,single.00-07", "--form", "remove"],
    );
    let bench = |args: &[&str]| {
        json(
            w,
            &[&["bench", "--json", "--seconds", "0.02"], args].concat(),
        )
    };
    let out = bench(&["--against", "small", "--batch", "1,3", "--size", "64"]);
    let rows = out["rows"].as_array().unwrap();
    // two steps and six kinds of block for each batch
    assert_eq!(rows.len(), 2 * (2 + 6));
    for row in rows {
        let time = number(row, "/time/median");
        assert!(
            time > 0.0 && number(row, "/time/low") <= time && time <= number(row, "/time/high")
        );
        assert!(number(row, "/share_of_peak_flops") > 0.0);
        assert_eq!(row["image_tokens"], 16);
    }
    let of = |what: &str, batch: u64| {
        let mut found = rows
            .iter()
            .filter(|r| r["what"] == what && r["batch"] == batch);
        found.next().unwrap_or_else(|| panic!("no {what}"))
    };
    let flops = |row: &Value| row["flops"].as_u64().unwrap();
    assert_eq!(flops(of("double", 3)), 3 * flops(of("double", 1)));
    // counted by hand: a layer of 128 × 128 on every token; one block's projections and attention
    let tokens = 16 + of("linear", 1)["text_tokens"].as_u64().unwrap();
    assert_eq!(flops(of("linear", 1)), 2 * 128 * 128 * tokens);
    let projections = 128 * (3 * 128 + 512) + (128 + 512) * 128;
    let single = 2 * (tokens * projections + 128 * 3 * 128) + 4 * tokens * tokens * 128;
    assert_eq!(flops(of("single", 1)), single);
    let steps: Vec<&Value> = rows
        .iter()
        .filter(|r| r["what"] == "step" && r["batch"] == 3)
        .collect();
    // 12 of 15 blocks are gone
    assert_eq!(
        (&steps[0]["model"], &steps[1]["model"]),
        (&"bundled".into(), &"small".into())
    );
    assert!(number(steps[1], "/speed_up") > 1.5, "{}", steps[1]);
    assert!(number(&out, "/peaks/0/flops_per_second") > 1e8);
    assert!(number(&out, "/peaks/0/bytes_per_second") > 1e8);

    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/tiny/transformer/config.json");
    let config = config.display().to_string();
    let out = bench(&[
        "--config",
        &config,
        "--size",
        "64",
        "--text-tokens",
        "5",
        "--step-only",
        "--dtype",
        "f32,bf16",
    ]);
    let rows = out["rows"].as_array().unwrap();
    let dtypes: Vec<&str> = rows.iter().map(|r| r["dtype"].as_str().unwrap()).collect();
    assert_eq!(dtypes, ["f32", "bf16"]);
    assert_eq!(rows[0]["text_tokens"], 5);
    assert_eq!(rows[0]["flops"], rows[1]["flops"]);
    assert!(number(&rows[0], "/bytes") > 1.9 * number(&rows[1], "/bytes"));
}
