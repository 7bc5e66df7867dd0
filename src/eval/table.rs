//! A report on a terminal.

use super::report::Report;
use crate::ui;

impl Report {
    /// What a terminal shows: at most 80 columns if names are short.
    pub fn table(&self) -> String {
        let number = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |v| format!("{v:.digits$}"))
        };
        let extra = self.settings.clip.is_some() || self.settings.lpips.is_some();
        let models = std::iter::once(&self.baseline).chain(&self.models);
        let rows: Vec<Vec<String>> = models
            .map(|m| {
                let against = m.against_baseline.as_ref();
                let speed_up = m.speed_up.map(|s| format!("{s:.2}x"));
                let mut row = vec![
                    m.name.clone(),
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
            "model",
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
        let mut out = ui::table(&header, &rows, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        if let Some(score) = self.models.iter().find_map(|m| m.prompt_following) {
            out.push_str(&format!(
                "\nfollowed: share of {} prompts in %, 95 % interval in report.html",
                score.ok.attempts
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
}
