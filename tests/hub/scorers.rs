//! Weights of scorers by their name on the hub, through the program.

use std::{fs, process::Command};

use serde_json::Value;

use crate::{
    alexnet::alexnet,
    mock::{self, ID, Served},
    setup::Setup,
};

const LPIPS: &str = "alex.safetensors";

#[test]
fn lpips_by_its_name_on_the_hub_is_that_of_the_file() {
    let setup = Setup::small();
    let work = tempfile::tempdir().unwrap();
    let bytes = alexnet(|slice| format!("net.slice{}.", slice + 1));
    fs::write(work.path().join(LPIPS), &bytes).unwrap();
    let stored = Served {
        bytes,
        stored: true,
    };
    setup.hub.state().files.insert(LPIPS.to_owned(), stored);
    let program = |args: &str, endpoint: &str| {
        let out = Command::new(assert_cmd::cargo::cargo_bin!("fastflux"))
            .current_dir(work.path())
            .args(args.split(' '))
            .env("CUDA_VISIBLE_DEVICES", "")
            .env("HF_ENDPOINT", endpoint)
            .env("HF_HUB_CACHE", &setup.settings.cache)
            .env_remove("HF_HUB_OFFLINE")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        out.stdout
    };
    let prune = "prune --blocks single.02 --form remove --num-prompts 4 --steps 1 --output pruned";
    program(prune, &mock::nobody());
    let measured = |lpips: &str, endpoint: &str| {
        let eval = "eval --model pruned --num-prompts 2 --steps 1 --json --force --lpips";
        let out = program(&format!("{eval} {lpips}"), endpoint);
        let report: Value = serde_json::from_slice(&out).unwrap();
        let mean = &report["models"][0]["against_baseline"]["lpips"]["mean"];
        let mean = mean.as_f64().unwrap();
        assert!(mean > 0.0, "{report}");
        let name = report["settings"]["lpips"].as_str().unwrap();
        (mean.to_bits(), name.to_owned())
    };
    let (expected, _) = measured(LPIPS, &mock::nobody());
    let (fetched, name) = measured(ID, &setup.hub.address);
    assert_eq!(name, format!("{ID} (AlexNet)"));
    assert_eq!(fetched, expected);
    assert_eq!(setup.hub.count(&format!("GET /store/{LPIPS}")), 1);
    // from the cache, without the hub
    assert_eq!(measured(ID, &mock::nobody()).0, expected);
}
