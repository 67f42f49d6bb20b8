//! Counting what a sweep found.

use std::collections::BTreeMap;

use wgpu_attention::{AttentionProblem, Cache, Dtype, Similarity};

use crate::output::Table;

/// Faults that are printed one by one; more say nothing new.
const SHOWN: usize = 10;

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    cases: usize,
    beyond: usize,
    unfit: usize,
    worst: f64,
}

/// Results by kernel and element type.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    order: Vec<(String, Dtype)>,
    counts: BTreeMap<String, Count>,
    options: BTreeMap<&'static str, usize>,
    faults: Vec<String>,
    results: usize,
}

impl Tally {
    fn count(&mut self, kernel: &str, dtype: Dtype) -> &mut Count {
        let key = format!("{kernel} {dtype}");
        if !self.counts.contains_key(&key) {
            self.order.push((kernel.into(), dtype));
        }
        self.counts.entry(key).or_default()
    }

    /// One result: its error in terms of its budget counts for every kernel that took part.
    pub(crate) fn result(&mut self, kernels: &[String], dtype: Dtype, ratio: f64) {
        self.results += 1;
        let mut kernels = kernels.to_vec();
        kernels.sort_unstable();
        kernels.dedup();
        for kernel in kernels {
            let count = self.count(&kernel, dtype);
            count.cases += 1;
            count.beyond += usize::from(ratio > 1.0);
            count.worst = count.worst.max(ratio);
        }
    }

    /// A problem that a kernel family does not serve.
    pub(crate) fn unfit(&mut self, family: &str, dtype: Dtype) {
        self.count(family, dtype).unfit += 1;
    }

    /// What a problem has, for the line that says what was covered.
    pub(crate) fn seen(&mut self, p: &AttentionProblem) {
        let bilinear = matches!(p.similarity, Similarity::Bilinear { .. });
        let additive = matches!(p.similarity, Similarity::Additive { .. });
        for (present, name) in [
            (p.similarity == Similarity::Dot, "dot"),
            (p.similarity == Similarity::Cosine, "cosine"),
            (bilinear, "bilinear"),
            (additive, "additive"),
            (p.scale.is_some(), "scale"),
            (p.softcap.is_some(), "softcap"),
            (p.bias.is_some(), "bias"),
            (p.alibi, "alibi"),
            (p.mask.is_some(), "mask"),
            (p.causal.is_some(), "causal"),
            (p.window.is_some(), "window"),
            (p.kv_lens, "kv-lens"),
            (p.sinks, "sinks"),
            (p.heads_q != p.heads_kv, "grouped heads"),
            (p.weights, "weights"),
            (matches!(p.cache, Cache::Ring { .. }), "ring"),
            (matches!(p.cache, Cache::Paged { .. }), "pages"),
            (matches!(p.cache, Cache::Ragged { .. }), "ragged keys"),
            (p.total_q.is_some(), "ragged queries"),
            (p.stored_kv() != p.dtype && p.stored_kv().is_float(), "k and v of another type"),
            (!p.stored_kv().is_float(), "k and v quantised"),
        ] {
            *self.options.entry(name).or_default() += usize::from(present);
        }
    }

    /// A result outside its budget, in words.
    pub(crate) fn fault(&mut self, what: String) {
        self.faults.push(what);
    }

    /// How many results were held to the oracle.
    pub(crate) fn results(&self) -> usize {
        self.results
    }

    /// How many results were outside their budget.
    pub(crate) fn faults(&self) -> usize {
        self.faults.len()
    }

    /// The table, what was covered, and the first faults.
    pub(crate) fn report(&self) -> String {
        let mut table =
            Table::new(&["<kernel", "<dtype", "cases", "not served", "beyond", "worst error / budget"]);
        let mut order = self.order.clone();
        order.sort_by_key(|(kernel, dtype)| (kernel.clone(), *dtype as u8));
        for (kernel, dtype) in order {
            let count = self.counts.get(&format!("{kernel} {dtype}")).copied().unwrap_or_default();
            let worst = if count.cases == 0 { "-".into() } else { format!("{:.3}", count.worst) };
            table.row([
                kernel,
                dtype.to_string(),
                count.cases.to_string(),
                count.unfit.to_string(),
                count.beyond.to_string(),
                worst,
            ]);
        }
        let covered: Vec<String> = self.options.iter().map(|(name, n)| format!("{name} {n}")).collect();
        let mut text =
            table.render() + &format!("\n{} results; problems with: {}\n", self.results, covered.join(", "));
        for fault in self.faults.iter().take(SHOWN) {
            text += &format!("beyond: {fault}\n");
        }
        if self.faults.len() > SHOWN {
            text += &format!("and {} more\n", self.faults.len() - SHOWN);
        }
        text
    }
}
