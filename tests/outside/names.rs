//! How cards and reports call models, and what they were made of.

use std::{fs, path::Path};

use crate::{
    common::*,
    published::{SMALL, prune_small},
};

#[test]
fn the_card_of_a_model_that_was_pruned_twice_tells_the_whole_way() {
    let work = folder();
    let w = work.path();
    copy(Path::new(&golden("dev/pipe")), &w.join("pipe"));
    prune_small(w, "once", &[]);
    let again = SMALL.map(|word| match word {
        "pipe" => "once",
        "single.01" => "double.00",
        other => other,
    });
    ok(w, &[&["prune", "--output", "twice"], &again[..]].concat());
    ok(
        w,
        &[
            "convert", "--model", "twice", "--dtype", "f16", "--output", "half",
        ],
    );
    let card = |folder: &str| fs::read_to_string(w.join(folder).join("README.md")).unwrap();
    let first = "Of pipe:\n\n1. `prune` replaced single.01\n";
    let second = format!("{first}2. `prune` replaced double.00\n");
    assert!(
        card("once").contains(&format!("{first}\nThe last")),
        "{}",
        card("once")
    );
    assert!(
        card("twice").contains(&format!("{second}\nThe last")),
        "{}",
        card("twice")
    );
    assert!(card("half").contains(&format!("{second}3. `convert` wrote it in f16\n\nThe last")));
    assert!(card("once").contains("against the unpruned model"));
    assert!(card("twice").contains("against `once`"));
    // both say how large the base was
    let before = |card: String| {
        let (_, rest) = card.split_once(" parameters instead of ").unwrap();
        rest.split(',').next().unwrap().to_owned()
    };
    assert_eq!(before(card("once")), before(card("twice")));
    assert!(card("once").contains("1 of 5 blocks of the transformer is replaced"));
    let steps = json(w, &["inspect", "--model", "twice", "--json"])["steps"].clone();
    assert_eq!(
        steps,
        serde_json::json!(["`prune` replaced single.01", "`prune` replaced double.00"])
    );
    let table = ok(w, &["inspect", "--model", "twice"]);
    assert!(
        table.contains("\n            `prune` replaced double.00\n"),
        "{table}"
    );
}

#[test]
fn long_paths_are_short_names_in_reports() {
    let work = folder();
    let w = work.path();
    let plan = r#"{"source": "", "replace": [{"replaces": ["double.01"], "form": "linear"}], "reason": ""}"#;
    let long =
        w.join("models-of-somebody-who-likes-long-names/pruned-by-seven-percent-and-not-trained");
    for name in ["one", "two"] {
        let folder = long.join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("plan.json"), plan).unwrap();
    }
    fs::write(w.join("quick.json"), QUICK).unwrap();
    let paths = ["one", "two"].map(|name| long.join(name).join("plan.json").display().to_string());
    let args = [
        "--plan",
        &paths[0],
        "--plan",
        &paths[1],
        "--recipe",
        "quick.json",
        "--num-prompts",
        "2",
        "--steps",
        "2",
    ];
    let table = ok(w, &[&["eval", "--output", "report"], &args[..]].concat());
    assert!(
        table.contains("\na: bundled\nb: one/plan.json\nc: two/plan.json\n"),
        "{table}"
    );
    assert!(
        table.contains('×') && table.lines().all(|line| line.chars().count() <= 80),
        "{table}"
    );
    let home = w.display().to_string();
    for file in ["report.html", "report.json", "images.png"] {
        let bytes = fs::read(w.join("report").join(file)).unwrap();
        assert!(
            !String::from_utf8_lossy(&bytes).contains(&home),
            "{file} says where models lie"
        );
    }
}
