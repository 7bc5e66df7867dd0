//! Models on the hub, against a hub on this machine: downloads, the cache, faults, and every message.
#![cfg(feature = "hub")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::PathBuf};

use fastflux::files::Files;

#[path = "../outside/alexnet.rs"]
mod alexnet;
mod framing;
mod mock;
mod scorers;
mod setup;

use mock::{COMMIT, ID};
use setup::{CONFIG, Setup, WEIGHTS, assert_says};

#[test]
fn files_are_fetched_when_read_and_then_come_from_the_cache() {
    let setup = Setup::small();
    let files = setup.open().unwrap();
    assert_eq!(
        files.sub("transformer").list().unwrap(),
        ["config.json", "model.safetensors"]
    );
    assert_eq!(files.list().unwrap(), ["README.md", "transformer"]);
    assert_eq!(files.model_ref(), format!("{ID}@{COMMIT}"));
    assert_eq!(files.resolved(), Some(format!("{ID}@{COMMIT}")));
    assert_eq!(files.note(), None);
    assert_eq!(setup.hub.count("resolve"), 0);

    assert_eq!(
        &*files.sub("transformer").read("config.json").unwrap(),
        b"{\"hidden_size\": 64}"
    );
    assert_eq!(setup.hub.count("GET /"), 1);
    assert_eq!(setup.cached("snapshots").len(), 1);

    assert_eq!(&*files.read(WEIGHTS).unwrap(), setup.expected());
    assert!(files.get("vae/config.json").unwrap().is_none());
    assert_says(
        files.read("vae/config.json"),
        &["vae/config.json", "does not exist"],
    );
    setup.hub.count("");

    assert_eq!(setup.weights().unwrap(), setup.expected());
    assert_eq!(files.read(CONFIG).unwrap().len(), 19);
    let log = std::mem::take(&mut setup.hub.state().log);
    assert!(
        log.iter().all(|line| line.contains("/api/models/")),
        "{log:?}"
    );
}

#[test]
fn a_revision_opens_and_is_part_of_the_name() {
    let setup = Setup::small();
    for revision in ["refs/pr/1", COMMIT] {
        let files = Files::hub_with(&setup.settings, ID, Some(revision)).unwrap();
        assert_eq!(
            files.describe("README.md"),
            format!("{ID}@{revision}:README.md")
        );
        assert_eq!(files.read("README.md").unwrap().len(), 6);
    }
    let unknown = Files::hub_with(&setup.settings, ID, Some("v9"));
    assert_says(unknown, &[ID, "no revision `v9`", "hint: "]);
}

#[test]
fn a_gated_repository_says_where_to_accept_and_how_to_sign_in() {
    let mut setup = Setup::small();
    let files = setup.open().unwrap();
    setup.hub.state().faults.refuse = Some((401, "GatedRepo", "Access is restricted"));
    let accept = format!("{}/{ID}", setup.hub.address);
    assert_says(files.read(WEIGHTS), &["is gated", &accept, "HF_TOKEN"]);
    assert_says(setup.open(), &["is gated", &accept]);

    setup.settings.token = Some("hf_secret".to_owned());
    setup.hub.state().faults.refuse = Some((403, "GatedRepo", "not in the authorized list"));
    assert_says(
        setup.open(),
        &["is gated, and your token has no access", &accept],
    );
    setup.assert_nothing_shown();
}

#[test]
fn a_bad_token_a_missing_one_and_a_good_one_differ() {
    let mut setup = Setup::small();
    setup.hub.state().token = Some("hf_secret_good");
    assert_says(
        setup.open(),
        &[ID, "does not exist", "or it is private", "HF_TOKEN"],
    );
    setup.settings.token = Some("hf_secret_bad".to_owned());
    assert_says(
        setup.open(),
        &[
            "does not accept your token",
            "Invalid credentials",
            "HF_TOKEN",
        ],
    );
    setup.settings.token = Some("hf_secret_good".to_owned());
    assert_eq!(setup.weights().unwrap(), setup.expected());
    let log = std::mem::take(&mut setup.hub.state().log);
    let store = log.iter().find(|line| line.contains("/store/")).unwrap();
    assert!(
        !store.contains("auth"),
        "the token went to another server: {store}"
    );
}

#[test]
fn an_unknown_repository_is_not_found() {
    let mut setup = Setup::small();
    assert_says(
        Files::hub_with(&setup.settings, "nobody/nothing", None),
        &["`nobody/nothing` does not exist", "spelling"],
    );
    setup.settings.token = Some("hf_secret".to_owned());
    assert_says(
        Files::hub_with(&setup.settings, "nobody/nothing", None),
        &[
            "`nobody/nothing` does not exist",
            "your token may not see it",
        ],
    );
}

#[test]
fn an_endpoint_that_is_no_address_is_named() {
    let mut setup = Setup::small();
    for endpoint in ["huggingface.co", "mailto:someone"] {
        setup.settings.endpoint = endpoint.to_owned();
        assert_says(
            setup.open(),
            &[endpoint, "is not the address", "HF_ENDPOINT"],
        );
    }
}

#[test]
fn other_refusals_are_explained() {
    let setup = Setup::small();
    for (refusal, parts) in [
        (
            (403, "", "Please enable access"),
            ["forbids", "Please enable access"],
        ),
        ((429, "", ""), ["too many requests", "wait 7 seconds"]),
        ((503, "", "Service down"), ["HTTP 503", "Service down"]),
        ((418, "", "teapot"), ["HTTP 418", "teapot"]),
    ] {
        setup.hub.state().faults.refuse = Some(refusal);
        assert_says(setup.open(), &parts);
    }
}

#[test]
fn without_network_the_cache_opens_and_says_so() {
    let mut setup = Setup::small();
    let nobody = mock::nobody();
    setup.settings.endpoint.clone_from(&nobody);
    assert_says(
        setup.open(),
        &[&format!("cannot reach {nobody}"), "refused", "hint: "],
    );

    setup.settings.endpoint.clone_from(&setup.hub.address);
    setup.open().unwrap().read(CONFIG).unwrap();
    setup.settings.endpoint = nobody;
    let files = setup.open().unwrap();
    assert_eq!(files.read(CONFIG).unwrap().len(), 19);
    assert_eq!(files.resolved(), Some(format!("{ID}@{COMMIT}")));
    assert!(files.note().unwrap().contains("cannot reach"));
    assert!(files.get(WEIGHTS).unwrap().is_none());
    assert_says(
        files.read(WEIGHTS),
        &[WEIGHTS, "not in the cache", "cannot reach"],
    );
}

#[test]
fn offline_the_hub_is_never_asked() {
    let mut setup = Setup::small();
    setup.settings.offline = true;
    assert_says(setup.open(), &["HF_HUB_OFFLINE", ID, "not in the cache"]);

    setup.settings.offline = false;
    setup.open().unwrap().read(CONFIG).unwrap();
    setup.settings.offline = true;
    setup.hub.count("");
    let files = setup.open().unwrap();
    assert_eq!(files.list().unwrap(), ["transformer"]);
    assert_eq!(files.read(CONFIG).unwrap().len(), 19);
    assert_eq!(files.note(), None);
    assert_says(files.read(WEIGHTS), &[WEIGHTS, "HF_HUB_OFFLINE"]);
    let pinned = Files::hub_with(&setup.settings, ID, Some(COMMIT)).unwrap();
    assert_eq!(pinned.read(CONFIG).unwrap().len(), 19);
    assert_says(
        Files::hub_with(&setup.settings, ID, Some("refs/pr/1")),
        &["HF_HUB_OFFLINE", "refs/pr/1"],
    );
    assert_eq!(setup.hub.count(""), 0);
}

#[test]
fn a_cut_connection_goes_on_where_it_stopped() {
    let setup = Setup::small();
    setup.hub.state().faults.cut = [100_000, 50_000].into();
    assert_eq!(setup.weights().unwrap(), setup.expected());
    let log = std::mem::take(&mut setup.hub.state().log);
    let starts = ["from 100000", "from 150000"];
    assert!(
        starts.iter().all(|s| log.iter().any(|l| l.ends_with(s))),
        "{log:?}"
    );
}

#[test]
fn a_download_that_failed_goes_on_in_the_next_run() {
    let setup = Setup::impatient();
    setup.hub.state().faults.cut = std::iter::once(120_000).chain([0; 9]).collect();
    assert_says(
        setup.weights(),
        &[
            WEIGHTS,
            "cut at 120.00 kB of 300.00 kB",
            "goes on from there",
        ],
    );
    setup.assert_nothing_shown();
    setup.hub.state().faults.cut.clear();
    setup.hub.count("");
    assert_eq!(setup.weights().unwrap(), setup.expected());
    assert_eq!(
        setup
            .hub
            .count("/store/transformer/model.safetensors from 120000"),
        1
    );
    assert_eq!(setup.cached("fastflux-part"), Vec::<PathBuf>::new());
}

#[test]
fn a_server_without_ranges_sends_everything_again() {
    let setup = Setup::small();
    setup.hub.state().faults.no_ranges = true;
    setup.hub.state().faults.cut = [100_000].into();
    assert_eq!(setup.weights().unwrap(), setup.expected());
}

#[test]
fn wrong_bytes_are_never_shown() {
    let setup = Setup::small();
    setup.hub.state().faults.garble = true;
    assert_says(setup.weights(), &[WEIGHTS, "SHA-256"]);
    setup.assert_nothing_shown();
    assert_eq!(setup.cached("fastflux-part"), Vec::<PathBuf>::new());
    setup.hub.state().faults.garble = false;
    assert_eq!(setup.weights().unwrap(), setup.expected());
}

#[test]
fn a_damaged_part_is_fetched_again() {
    let setup = Setup::impatient();
    setup.hub.state().faults.cut = std::iter::once(120_000).chain([0; 9]).collect();
    setup.weights().unwrap_err();
    setup.hub.state().faults.cut.clear();
    let part = setup.cached("fastflux-part").remove(0);
    for damaged in [vec![0; 120_000], vec![0; 300_000], vec![0; 300_001]] {
        fs::write(&part, damaged).unwrap();
        assert_eq!(setup.weights().unwrap(), setup.expected());
        fs::remove_dir_all(
            setup
                .cache
                .path()
                .join("models--black-forest-labs--FLUX.1-tiny/snapshots"),
        )
        .unwrap();
        setup
            .cached("blobs")
            .iter()
            .for_each(|p| fs::remove_file(p).unwrap());
    }
}

#[test]
fn an_error_page_is_not_a_file() {
    let setup = Setup::impatient();
    for (refusal, says) in [
        ((403, "", "expired"), "forbids access"),
        ((404, "", "gone"), "has no file"),
        (
            (500, "", "broken"),
            "cut at 0 B of 300.00 kB: the hub has trouble",
        ),
    ] {
        setup.hub.state().faults.refuse_bytes = Some(refusal);
        assert_says(setup.weights(), &[says]);
        setup.assert_nothing_shown();
    }
}

#[test]
fn a_file_larger_than_the_disk_is_not_begun() {
    let setup = Setup::small();
    setup.hub.state().faults.claim = Some(1 << 60);
    assert_says(
        setup.weights(),
        &["the disk is full", WEIGHTS, "are free", "HF_HOME"],
    );
    assert_eq!(setup.hub.count("/store/"), 0);
}

#[test]
fn a_file_that_is_shorter_than_announced_is_refused() {
    for no_ranges in [false, true] {
        let setup = Setup::impatient();
        setup.hub.state().faults.claim = Some(300_001);
        setup.hub.state().faults.no_ranges = no_ranges;
        let says = if no_ranges {
            "ended early"
        } else {
            "more bytes"
        };
        assert_says(setup.weights(), &[WEIGHTS, says]);
        setup.assert_nothing_shown();
    }
}

#[test]
fn a_renamed_repository_is_followed() {
    let setup = Setup::small();
    setup.hub.state().faults.renamed = true;
    assert_eq!(setup.weights().unwrap(), setup.expected());
}

#[test]
fn two_readers_fetch_a_file_once() {
    let setup = Setup::small();
    let readers: [_; 2] = std::array::from_fn(|_| setup.open().unwrap());
    setup.hub.count("");
    std::thread::scope(|scope| {
        for files in readers {
            scope.spawn(move || assert_eq!(files.read(WEIGHTS).unwrap().len(), 300_000));
        }
    });
    assert_eq!(setup.hub.count("/store/"), 1);
}
