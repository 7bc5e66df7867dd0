//! Hub ids: `owner/name[@revision]`.

/// Splits a hub id; `None` when the text cannot be one.
pub fn parse_id(text: &str) -> Option<(String, Option<String>)> {
    let (id, revision) = match text.split_once('@') {
        Some((id, revision)) => (id, Some(revision.to_owned())),
        None => (text, None),
    };
    let (owner, name) = id.split_once('/')?;
    let legal = |part: &str| {
        !part.is_empty()
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !part.starts_with('.')
    };
    (legal(owner) && legal(name) && revision.as_deref() != Some(""))
        .then(|| (id.to_owned(), revision))
}
