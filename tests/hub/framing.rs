//! Answers that are compressed, chunked, or end with the connection.

use std::time::Duration;

use crate::{
    mock::Framing,
    setup::{CONFIG, Setup, WEIGHTS, assert_says},
};

#[test]
fn answers_may_be_compressed_and_end_in_any_way() {
    for framing in [Framing::Length, Framing::Chunked, Framing::Close] {
        for gzip in [false, true] {
            let setup = Setup::small();
            {
                let faults = &mut setup.hub.state().faults;
                (faults.gzip, faults.framing) = (gzip, framing);
            }
            let files = setup.open().unwrap();
            let config = files.read(CONFIG).unwrap();
            assert_eq!(&*config, b"{\"hidden_size\": 64}", "{framing:?} {gzip}");
            assert_eq!(files.read("README.md").unwrap().len(), 6);
            let weights = files.read(WEIGHTS).unwrap();
            assert!(*weights == *setup.expected(), "{framing:?} {gzip}");
            assert_says(
                files.read("vae/config.json"),
                &["vae/config.json", "does not exist"],
            );
        }
    }
}

#[test]
fn an_answer_of_unknown_length_that_is_cut_is_no_file() {
    let ways = [
        (true, Framing::Length),
        (true, Framing::Chunked),
        (true, Framing::Close),
        (false, Framing::Chunked),
        (false, Framing::Close),
    ];
    for (gzip, framing) in ways {
        let mut setup = Setup::impatient();
        {
            let faults = &mut setup.hub.state().faults;
            (faults.gzip, faults.framing) = (gzip, framing);
            faults.cut = [10].into();
        }
        let files = setup.open().unwrap();
        assert_says(files.read(CONFIG), &[CONFIG, "was cut after", "hint: "]);
        setup.assert_nothing_shown();
        setup.hub.state().faults.cut.clear();
        assert_eq!(files.read(CONFIG).unwrap().len(), 19);
        // and of a large file nothing is shown before all of it is there
        setup.settings.patience = Duration::from_secs(60);
        setup.hub.state().faults.cut = [100_000].into();
        assert_eq!(setup.weights().unwrap(), setup.expected());
    }
}
