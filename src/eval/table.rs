//! A report on a terminal.

use super::report::Report;
use crate::ui;

/// Columns of a terminal.
const COLUMNS: usize = 80;
/// Above the names.
const MODEL: &str = "model";

impl Report {
    /// What a terminal shows, in at most 80 columns: letters stand for names that are long, and are explained below.
    pub fn table(&self) -> String {
        let models = || std::iter::once(&self.baseline).chain(&self.models);
        let names: Vec<String> = models().map(|m| m.name.clone()).collect();
        let letters: Vec<String> = (0..names.len()).map(letter).collect();
        let mut out = self.numbers(&letters);
        let widest = |lines: &mut dyn Iterator<Item = &str>| lines.map(|l| l.chars().count()).max();
        let table = widest(&mut out.lines()).unwrap_or(0) - MODEL.len();
        let name = widest(&mut names.iter().map(String::as_str)).unwrap_or(0);
        if table + name.max(MODEL.len()) <= COLUMNS {
            out = self.numbers(&names);
        } else {
            let explained = letters.iter().zip(&names);
            let explained = explained.map(|(letter, name)| format!("\n{letter}: {name}"));
            out = out + "\n" + &explained.collect::<String>();
        }
        if let Some(score) = self.models.iter().find_map(|m| m.prompt_following) {
            out.push_str(&format!(
                "\nfollowed: share of {} in %, 95 % interval in report.html",
                ui::counted(score.ok.attempts, "prompt")
            ));
        }
        for (index, model) in self.models.iter().enumerate() {
            let worst = model.against_baseline.iter().flat_map(|a| &a.worst).take(3);
            for pair in worst.filter_map(|i| self.pairs.get(*i)) {
                let psnr = pair.models.get(index).map_or(0.0, |m| m.psnr);
                out.push_str(&format!(
                    "\nworst of {}: {psnr:.1} dB, seed {}\n  {}",
                    model.name, pair.seed, pair.prompt
                ));
            }
        }
        out
    }

    /// A row for each model, by these names.
    fn numbers(&self, names: &[String]) -> String {
        let number = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |v| format!("{v:.digits$}"))
        };
        let extra = self.settings.clip.is_some() || self.settings.lpips.is_some();
        let models = std::iter::once(&self.baseline).chain(&self.models);
        let rows: Vec<Vec<String>> = models
            .zip(names)
            .map(|(m, name)| {
                let against = m.against_baseline.as_ref();
                let speed_up = m.speed_up.map(|s| format!("{s:.2}×"));
                let mut row = vec![
                    name.clone(),
                    ui::count(m.parameters as f64),
                    format!("{:.2}", 1e3 * m.step.median),
                    speed_up.unwrap_or_else(|| "-".to_owned()),
                    number(against.map(|a| a.velocity.error), 5),
                    number(against.map(|a| a.psnr.mean), 2),
                    number(against.map(|a| a.ssim.mean), 4),
                    number(m.prompt_following.map(|p| 100.0 * p.ok.share), 1),
                ];
                // these columns only if there is something in them; then others make room
                if extra {
                    row.remove(1);
                }
                if self.settings.clip.is_some() {
                    row.push(number(m.clip_score.as_ref().map(|s| s.mean), 2));
                }
                if self.settings.lpips.is_some() {
                    let lpips = against.and_then(|a| a.lpips.as_ref());
                    row.push(number(lpips.map(|s| s.mean), 4));
                }
                row
            })
            .collect();
        let mut header = vec![
            MODEL,
            "parameters",
            "step, ms",
            "speed",
            "velocity error",
            "PSNR",
            "SSIM",
            "followed",
        ];
        if extra {
            header.remove(1);
            header[3] = "error";
        }
        header.extend(self.settings.clip.as_ref().map(|_| "CLIP"));
        header.extend(self.settings.lpips.as_ref().map(|_| "LPIPS"));
        ui::table(&header, &rows, &[1, 2, 3, 4, 5, 6, 7, 8, 9])
    }
}

/// a to z, then z1, z2, …
fn letter(index: usize) -> String {
    let letter = ('a'..='z').nth(index).map(String::from);
    letter.unwrap_or_else(|| format!("z{}", index - 25))
}
