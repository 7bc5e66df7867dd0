//! Hub ids: `owner/name[@revision]`.
//!
//! Grammar only; compiled without hub support too, so that the message can say what is missing.

/// The page a repository is shown at; people paste its address.
const SITE: &str = "https://huggingface.co/";

/// The longest owner or name the hub allows.
const LONGEST: usize = 96;

/// The id and the revision in `owner/name`, `owner/name@revision` or `https://huggingface.co/owner/name[/tree/revision]`;
/// `None` when `text` cannot be a hub id.
///
/// The characters are those the hub allows. A relative path such as `models/flux` has the same form: look for a
/// file or folder of that name first. Names of weight and config files are refused, so that a mistyped path never
/// becomes a network request.
///
/// ```
/// use fastflux::files::parse_id;
///
/// let id = parse_id("black-forest-labs/FLUX.1-dev@refs/pr/1");
/// assert_eq!(id, Some(("black-forest-labs/FLUX.1-dev".into(), Some("refs/pr/1".into()))));
/// assert_eq!(parse_id("./models/flux"), None);
/// ```
pub fn parse_id(text: &str) -> Option<(String, Option<String>)> {
    let (id, revision) = match text.strip_prefix(SITE) {
        Some(page) => match page.trim_end_matches('/').split_once("/tree/") {
            Some((id, revision)) => (id, Some(revision)),
            None => (page.trim_end_matches('/'), None),
        },
        None => match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (text, None),
        },
    };
    let (owner, name) = id.split_once('/')?;
    let is_file = [".safetensors", ".json", ".git"]
        .iter()
        .any(|end| name.ends_with(end));
    if is_file || !is_part(owner) || !is_part(name) || !revision.is_none_or(is_revision) {
        return None;
    }
    Some((id.to_owned(), revision.map(str::to_owned)))
}

/// Whether `text` may be an owner or a repository name (`validate_repo_id` of `huggingface_hub`).
fn is_part(text: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    text.len() <= LONGEST
        && edge(text.chars().next())
        && edge(text.chars().next_back())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        && !text.contains("--")
        && !text.contains("..")
}

/// Whether `text` may be a branch, a tag, `refs/pr/N` or a commit (the ASCII part of `git check-ref-format`).
fn is_revision(text: &str) -> bool {
    let is_lock = text.strip_suffix(".lock").is_some(); // git's own file
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && !part.ends_with('.')
            && !part.contains("..")
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.+".contains(c))
    };
    !is_lock && text.split('/').all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Option<(String, Option<String>)> {
        parse_id(text)
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig {
            failure_persistence: None,
            ..proptest::prelude::ProptestConfig::default()
        })]

        #[test]
        fn any_text_is_an_id_of_the_hubs_form_or_none(text in "[a-zA-Z0-9@/_.:-]{0,30}") {
            if let Some((id, revision)) = parse_id(&text) {
                let (owner, name) = id.split_once('/').unwrap();
                assert!(is_part(owner) && is_part(name) && !name.contains('/'), "{text}");
                assert!(revision.is_none_or(|r| is_revision(&r)), "{text}");
            }
        }
    }

    #[test]
    fn owner_and_name_are_an_id() {
        for text in [
            "black-forest-labs/FLUX.1-dev",
            "Freepik/flux.1-lite-8B-alpha",
            "a/b",
            "_a/b_c.d-e",
            "TencentARC/flux-mini",
        ] {
            assert_eq!(parsed(text), Some((text.to_owned(), None)), "{text}");
        }
    }

    #[test]
    fn a_revision_follows_an_at_sign() {
        for revision in ["main", "v1.0", "refs/pr/12", "feature/x+y", "0a1b2c3d"] {
            let found = parsed(&format!("o/n@{revision}"));
            assert_eq!(found, Some(("o/n".to_owned(), Some(revision.to_owned()))));
        }
    }

    #[test]
    fn the_address_of_a_page_is_an_id() {
        let plain = Some(("o/n".to_owned(), None));
        assert_eq!(parsed("https://huggingface.co/o/n"), plain);
        assert_eq!(parsed("https://huggingface.co/o/n/"), plain);
        assert_eq!(
            parsed("https://huggingface.co/o/n/tree/refs/pr/2"),
            Some(("o/n".to_owned(), Some("refs/pr/2".to_owned())))
        );
        assert_eq!(
            parsed("https://huggingface.co/o/n/blob/main/config.json"),
            None
        );
        assert_eq!(parsed("https://example.org/o/n"), None);
    }

    #[test]
    fn paths_and_malformed_ids_are_not_ids() {
        let long = format!("o/{}", "n".repeat(97));
        for text in [
            "",
            "name",
            "/abs/path",
            "./o/n",
            "../o/n",
            "o/",
            "/n",
            "a/b/c",
            "o\\n",
            "C:\\models\\flux",
            "~/flux",
            "o/n.safetensors",
            "o/config.json",
            "o/n.git",
            "o/-n",
            "o/n.",
            "o/n-",
            "o/a--b",
            "o/a..b",
            "o/n m",
            "o/ñ",
            "o/n@",
            "o/n@/main",
            "o/n@main/",
            "o/n@a//b",
            "o/n@../x",
            "o/n@a b",
            "o/n@a@b",
            "o/n@-x",
            "o/n@x.lock",
            &long,
        ] {
            assert_eq!(parsed(text), None, "{text:?}");
        }
    }
}
