//! Any text as the `Location` of a redirection: the next address is of the hub's origin if it is a path, and of the
//! origin that a browser's reader (the `url` crate's rules) would see otherwise.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../src/files/hub/redirect.rs"]
mod redirect;

const HUB: &str = "https://hub.example/o/n/resolve/main/a";

fuzz_target!(|location: &str| {
    let Some(next) = redirect::redirected(HUB, location) else {
        return;
    };
    assert!(next.to_ascii_lowercase().starts_with("https://"));
    if location.starts_with('/') {
        assert!(redirect::same_origin(&next, HUB), "{next}");
    }
    let read = url::Url::parse(&next);
    if let Ok(read) = read
        && redirect::same_origin(&next, HUB)
    {
        assert_eq!(read.host_str(), Some("hub.example"), "{next}");
        assert_eq!(read.port_or_known_default(), Some(443), "{next}");
    }
});
