//! The report: figures beside their ceilings, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs;
use std::thread::available_parallelism;

use serde::{Serialize, Serializer};

use crate::stats::{Spread, ThreeDigits};

/// The results of one run of the program.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The start time, RFC 3339.
    pub(crate) at: String,
    pub(crate) machine: Machine,
    /// Program names and their versions.
    pub(crate) versions: BTreeMap<String, String>,
    /// The options: sizes, seconds, rounds.
    pub(crate) settings: BTreeMap<String, String>,
    pub(crate) figures: Vec<Figure>,
    /// Scenarios that failed, with the reason.
    pub(crate) failures: Vec<String>,
}

/// The machine of the measurement.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) memory_gib: f64,
    pub(crate) kernel: String,
    /// The load average of the last minute at the start. Other load makes the figures worse.
    pub(crate) load: f64,
}

impl Machine {
    /// Reads the properties of this machine.
    pub(crate) fn this() -> Self {
        let field = |file: &str, name: &str| {
            let text = fs::read_to_string(file).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let memory = field("/proc/meminfo", "MemTotal");
        let kib: f64 = memory.split(' ').next().and_then(|kib| kib.parse().ok()).unwrap_or_default();
        Self {
            processor: field("/proc/cpuinfo", "model name"),
            cores: available_parallelism().map_or(1, usize::from),
            memory_gib: (kib / 1_048_576.0 * 10.0).round() / 10.0,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            load: load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default(),
        }
    }
}

/// One figure of the daemon, with the ceiling that was measured in turn with it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figure {
    /// The scenario.
    pub(crate) measurement: &'static str,
    /// The store under the daemon.
    pub(crate) store: &'static str,
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    pub(crate) daemon: Spread,
    pub(crate) ceiling: Option<Ceiling>,
    /// The reason why a possible ceiling was not measured.
    pub(crate) no_ceiling: Option<&'static str>,
    /// The median of the daemon divided by the median of the ceiling.
    pub(crate) ratio: Option<f64>,
    pub(crate) goal: Option<Goal>,
    /// Whether the goal is met.
    pub(crate) met: Option<bool>,
}

impl Figure {
    pub(crate) fn new(
        measurement: &'static str,
        store: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        daemon: &[f64],
    ) -> Self {
        let daemon = Spread::of(daemon);
        let name = name.into();
        let (ceiling, no_ceiling, ratio, goal, met) = (None, None, None, None, None);
        Self { measurement, store, name, unit, daemon, ceiling, no_ceiling, ratio, goal, met }
    }

    /// Adds the ceiling, if it was measured.
    pub(crate) fn beside(mut self, name: &'static str, runs: &[f64]) -> Self {
        if runs.is_empty() {
            return self;
        }
        let spread = Spread::of(runs);
        self.ratio = (spread.median > 0.0).then(|| self.daemon.median / spread.median);
        self.ceiling = Some(Ceiling { name, spread });
        self.judge()
    }

    /// Adds the reason why the ceiling was not measured.
    pub(crate) fn not_beside(mut self, why: &'static str) -> Self {
        self.no_ceiling = Some(why);
        self
    }

    /// Adds a goal.
    pub(crate) fn with_goal(self, goal: Goal) -> Self {
        self.with_optional_goal(Some(goal))
    }

    /// Adds a goal, if there is one.
    pub(crate) fn with_optional_goal(mut self, goal: Option<Goal>) -> Self {
        self.goal = goal;
        self.judge()
    }

    fn judge(mut self) -> Self {
        self.met = self.goal.and_then(|goal| goal.is_met(self.daemon.median, self.ratio));
        self
    }
}

/// The result of the store alone, or of another program, in the same run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Ceiling {
    pub(crate) name: &'static str,
    #[serde(flatten)]
    pub(crate) spread: Spread,
}

/// The goal of a figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Goal {
    /// A lower bound of the ratio to the ceiling.
    RatioAtLeast(f64),
    /// An upper bound of the ratio to the ceiling.
    RatioAtMost(f64),
    /// A lower bound of the figure.
    AtLeast(f64),
    /// An upper bound of the figure.
    AtMost(f64),
}

impl Goal {
    fn is_met(self, value: f64, ratio: Option<f64>) -> Option<bool> {
        match self {
            Self::RatioAtLeast(bound) => ratio.map(|ratio| ratio >= bound),
            Self::RatioAtMost(bound) => ratio.map(|ratio| ratio <= bound),
            Self::AtLeast(bound) => Some(value >= bound),
            Self::AtMost(bound) => Some(value <= bound),
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RatioAtLeast(bound) => write!(f, "≥ {bound} ×"),
            Self::RatioAtMost(bound) => write!(f, "≤ {bound} ×"),
            Self::AtLeast(bound) => write!(f, "≥ {}", ThreeDigits(*bound)),
            Self::AtMost(bound) => write!(f, "≤ {}", ThreeDigits(*bound)),
        }
    }
}

impl Serialize for Goal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { processor, cores, memory_gib, kernel, load } = &self.machine;
        writeln!(f, "{processor}, {cores} cores, {memory_gib} GiB, Linux {kernel}, load {load} before")?;
        let list = |pairs: &BTreeMap<String, String>| {
            pairs.iter().map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
        };
        writeln!(f, "{}", list(&self.versions))?;
        writeln!(f, "{}\n", list(&self.settings))?;
        f.write_str(&table(&self.figures))?;
        for failure in &self.failures {
            writeln!(f, "\nfailed: {failure}")?;
        }
        Ok(())
    }
}

const TITLES: [&str; 8] = ["measurement", "store", "figure", "unit", "aurora-bus", "ceiling", "ratio", "goal"];

fn table(figures: &[Figure]) -> String {
    let mut rows = vec![TITLES.map(str::to_owned)];
    rows.extend(figures.iter().map(|figure| {
        let ceiling = figure.ceiling.as_ref();
        let goal = figure.goal.map(|goal| match figure.met {
            Some(true) => format!("{goal} met"),
            Some(false) => format!("{goal} MISSED"),
            None => goal.to_string(),
        });
        [
            figure.measurement.to_owned(),
            figure.store.to_owned(),
            figure.name.clone(),
            figure.unit.to_owned(),
            figure.daemon.to_string(),
            match ceiling {
                Some(ceiling) => format!("{} {}", ceiling.spread, ceiling.name),
                None => figure.no_ceiling.unwrap_or_default().to_owned(),
            },
            figure.ratio.map(|ratio| ThreeDigits(ratio).to_string()).unwrap_or_default(),
            goal.unwrap_or_default(),
        ]
    }));
    let mut widths = [0; TITLES.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        writeln!(out, "{}", cells.join("  ").trim_end()).expect("writing to a String succeeds");
        if index == 0 {
            let rule = widths.iter().map(|width| "-".repeat(*width)).collect::<Vec<_>>().join("  ");
            writeln!(out, "{rule}").expect("writing to a String succeeds");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_goal_is_judged_with_the_ceiling() {
        let figure = Figure::new("publish", "redis", "batched", "events/s", &[60.0]).with_goal(Goal::RatioAtLeast(0.5));
        assert_eq!(figure.met, None);
        let figure = figure.beside("raw", &[100.0]);
        assert_eq!((figure.ratio, figure.met), (Some(0.6), Some(true)));
        let slow = Figure::new("latency", "redis", "p50", "ms", &[0.4]).with_goal(Goal::RatioAtMost(1.5));
        assert_eq!(slow.beside("baseline relay", &[0.1]).met, Some(false));
        assert_eq!(Figure::new("start", "embedded", "s", "ms", &[90.0]).with_goal(Goal::AtMost(200.0)).met, Some(true));
    }

    #[test]
    fn table_has_one_aligned_row_per_figure() {
        let figures = [
            Figure::new("publish", "redis", "batched", "events/s", &[150e3, 160e3, 170e3])
                .beside("raw XADD", &[300e3])
                .with_goal(Goal::RatioAtLeast(0.5)),
            Figure::new("start", "embedded", "to ready", "ms", &[30.0]),
        ];
        let text = table(&figures);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[2].contains("160 k (150 k–170 k)") && lines[2].ends_with("≥ 0.5 × met"), "{text}");
        assert_eq!(lines[3].chars().take(11).collect::<String>(), "start      ");
    }
}
