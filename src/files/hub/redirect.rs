//! Where a redirection leads, read as strictly as anybody might: the token goes to the hub's own origin alone. No requests.

use ureq::http::Uri;

/// Scheme, host and port of an address, as they are compared: lower case, with the scheme's own port if none is said.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let authority = uri.authority()?;
    let port = match scheme.as_str() {
        "https" => 443,
        "http" => 80,
        _ => return None,
    };
    // `user@host` could be read as another host by another reader
    let plain = !authority.as_str().contains('@');
    plain.then(|| {
        (
            scheme,
            authority.host().to_ascii_lowercase(),
            authority.port_u16().unwrap_or(port),
        )
    })
}

/// Whether two addresses are of one origin.
pub(super) fn same_origin(url: &str, other: &str) -> bool {
    origin(url).is_some_and(|url| origin(other).as_ref() == Some(&url))
}

/// The address that a `Location` names, seen from `url`; `None` for what is none, or could be read as another one: a
/// backslash or a control character in it, or a path that begins with two slashes.
pub(super) fn redirected(url: &str, location: &str) -> Option<String> {
    if location.contains(|c: char| c.is_control() || c.is_whitespace() || c == '\\') {
        return None;
    }
    if location.starts_with("//") {
        return None;
    }
    let (scheme, host, port) = origin(url)?;
    if location.starts_with('/') {
        let next = format!("{scheme}://{host}:{port}{location}");
        // a path with `<` or a backtick in it is no address: readers differ on it
        return same_origin(&next, url).then_some(next);
    }
    let (_, _, _) = origin(location)?;
    // never from an encrypted connection to an open one
    (scheme == "http" || location.to_ascii_lowercase().starts_with("https://"))
        .then(|| location.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn redirections_stay_on_their_host_or_name_another_one_plainly() {
        let url = "https://hub.example/o/n/resolve/main/a";
        for (location, next) in [
            ("/api/x?y=1", Some("https://hub.example:443/api/x?y=1")),
            ("https://store.example/x", Some("https://store.example/x")),
            ("http://store.example/x", None),
            ("//store.example/x", None),
            ("/\\store.example/x", None),
            ("/\t/store.example/x", None),
            ("\\/store.example/x", None),
            ("https://hub.example@store.example/x", None),
            ("ftp://store.example/x", None),
            ("/a<b", None),
            ("/a`b", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(redirected(url, location).as_deref(), next, "{location:?}");
        }
        assert!(same_origin(
            "https://Hub.example/a",
            "https://hub.example:443"
        ));
        for other in [
            "http://hub.example",
            "https://hub.example:8443",
            "https://hub.example.evil.example",
        ] {
            assert!(!same_origin(other, "https://hub.example"), "{other}");
        }
    }

    proptest! {
        /// Whatever a server sends, the next address is of the origin that a strict reader sees in it.
        #[test]
        fn no_location_goes_where_it_does_not_say(location in "[/\\\\\\t :@.a-z0-9?#%|<>\"`^{}\\[\\]\u{0}-\u{20}]{0,40}") {
            if let Some(next) = redirected("https://hub.example/x", &location) {
                let own = location.starts_with('/');
                prop_assert_eq!(same_origin(&next, "https://hub.example"), own || origin(&location) == origin("https://hub.example"));
            }
        }
    }
}
