//! How reports call models: by as few last parts of their paths as tell them apart. Where models lie on a machine is nobody's
//! business, and long names make tables and charts that cannot be read.

use std::path::Path;

/// A name for each of `models`, in their order; names that are no paths of this machine stay.
pub fn short_names(models: &[&str]) -> Vec<String> {
    let short = |name: &str, parts: usize| {
        let path = Path::new(name);
        let all = path.components().count();
        let last = path.components().skip(all.saturating_sub(parts));
        last.collect::<std::path::PathBuf>().display().to_string()
    };
    let is_path = |name: &str| {
        let file = name.split(" + ").next().unwrap_or(name); // `base + patch`
        Path::new(file).exists()
    };
    let name = |(i, name): (usize, &&str)| {
        if !is_path(name) {
            return (*name).to_owned();
        }
        let others = || models.iter().enumerate().filter(move |(j, _)| *j != i);
        let all = Path::new(name).components().count();
        let mut tries = (1..=all).map(|parts| (parts, short(name, parts)));
        let unique =
            tries.find(|(parts, one)| others().all(|(_, other)| short(other, *parts) != *one));
        unique.map_or_else(|| (*name).to_owned(), |(_, name)| name)
    };
    models.iter().enumerate().map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::short_names;

    #[test]
    fn names_are_as_short_as_they_can_be() {
        let work = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = work.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            path.display().to_string()
        };
        let [a, b, c] = ["one/flux", "two/flux", "three"].map(path);
        let patched = format!("{a} + patch.safetensors:20");
        let all = ["bundled", &a, &b, &c, "owner/flux", &patched];
        let expected = [
            "bundled",
            "one/flux",
            "two/flux",
            "three",
            "owner/flux",
            "flux + patch.safetensors:20",
        ];
        assert_eq!(short_names(&all), expected);
        assert_eq!(short_names(&[&a, &a]), [a.clone(), a]);
    }
}
