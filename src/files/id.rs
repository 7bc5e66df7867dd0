//! Hub ids: `owner/name[@revision]`.
//!
//! Grammar only; compiled without hub support too, so that the message can say what is missing.

/// The page a repository is shown at; people paste its address.
const SITE: &str = "https://huggingface.co/";

/// Endings of files; no repository is named so.
const FILE_ENDINGS: [&str; 13] = [
    ".safetensors",
    ".sft",
    ".gguf",
    ".ckpt",
    ".pt",
    ".pth",
    ".bin",
    ".onnx",
    ".msgpack",
    ".json",
    ".txt",
    ".zip",
    ".git",
];

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
    let is_file = FILE_ENDINGS
        .iter()
        .any(|end| name.to_ascii_lowercase().ends_with(end));
    if is_file || !is_part(owner) || !is_part(name) || !revision.is_none_or(is_revision) {
        return None;
    }
    Some((id.to_owned(), revision.map(str::to_owned)))
}

/// The id and the path in `owner/name[@revision]/path/to/file.gguf`: one file of weights in a repository. `None` when
/// `text` cannot be that.
pub fn parse_file(text: &str) -> Option<((String, Option<String>), String)> {
    let text = text.strip_prefix(SITE).unwrap_or(text);
    let (owner, rest) = text.split_once('/')?;
    let (name, path) = rest.split_once('/')?;
    let id = parse_id(&format!("{owner}/{name}"))?;
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains('\\');
    let is_weights = [".safetensors", ".sft", ".gguf"]
        .iter()
        .any(|end| path.to_ascii_lowercase().ends_with(end));
    (is_weights && path.split('/').all(plain)).then(|| (id, path.to_owned()))
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
    fn a_file_follows_a_repository() {
        let found = parse_file("city96/FLUX.1-dev-gguf/flux1-dev-Q4_K_S.gguf").unwrap();
        assert_eq!(
            found,
            (
                ("city96/FLUX.1-dev-gguf".into(), None),
                "flux1-dev-Q4_K_S.gguf".into()
            )
        );
        let ((_, revision), path) = parse_file("o/n@v1/sub/a.safetensors").unwrap();
        assert_eq!(
            (revision.as_deref(), path.as_str()),
            (Some("v1"), "sub/a.safetensors")
        );
        for text in [
            "o/n",
            "models/a.gguf",
            "./o/n/a.gguf",
            "/o/n/a.gguf",
            "o/n/../a.gguf",
            "o/n/a.txt",
            "o/n//a.gguf",
        ] {
            assert_eq!(parse_file(text), None, "{text}");
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
            "models/flux1-dev-Q4_K_S.gguf",
            "models/flux1.SFT",
            "models/flux1.ckpt",
            "models/flux1.pt",
            "models/flux1.pth",
            "models/flux1.bin",
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
