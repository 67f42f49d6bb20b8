//! Holds what a path gave against the oracle, by the contract's error budget.

use wgpu_attention::reference::{self, Reference};
use wgpu_attention::{Dtype, Operand, Outputs, Similarity};

use super::case::{Case, indices};

/// What lies between the elements of a strided o.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gap {
    /// The one-shot calls and the CPU give zeros.
    Zero,
    /// The caller's buffer keeps what the caller had put there: this poison.
    Poison,
}

/// A quiet NaN that no arithmetic makes, as the poison of outputs.
pub const POISON: [(Dtype, u32); 3] =
    [(Dtype::F32, 0x7fc5_a5a5), (Dtype::F16, 0x7f5a), (Dtype::Bf16, 0x7fda)];

/// The poison of an element type, as bytes.
pub fn poison(dtype: Dtype) -> &'static [u8] {
    let (_, bits) = POISON.iter().find(|(of, _)| *of == dtype).expect("every dtype has a poison");
    &bytemuck::bytes_of(bits)[..dtype.bytes()]
}

/// The oracle's answer to one case, with what a path may differ from it.
pub struct Expected {
    pub oracle: Reference,
    /// Budget of every element of o, before the rounding to a narrower output type.
    pub o: f64,
    /// Budget of lse, to be scaled by `max(1, |lse|)` where the storage is f32.
    pub lse: f64,
    pub weights: f64,
}

const EPSILON: f64 = 8.0 / (1u64 << 24) as f64;

impl Expected {
    /// # Panics
    /// When the oracle refuses the case: those of this suite are valid.
    pub fn of(case: &Case) -> Self {
        let (p, inputs) = (&case.problem, case.data.inputs());
        let oracle = reference::oracle(p, &inputs).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        // lse is as large as the scores are, and as wrong as the scores were before a cap shrank them. So are
        // weights: they take a score's error times themselves.
        let score = match p.softcap {
            None => oracle.max_score.max(1.0),
            Some(_) => {
                let uncapped =
                    wgpu_attention::AttentionProblem { softcap: None, weights: false, ..p.clone() };
                let uncapped = reference::oracle(&uncapped, &inputs).map_or(0.0, |r| r.max_score);
                uncapped.max(oracle.max_score).max(1.0)
            }
        };
        if p.dtype == Dtype::F32 {
            // The rule of o for f32, whatever o is then rounded to.
            let f32_out = wgpu_attention::AttentionProblem { out_dtype: Dtype::F32, ..p.clone() };
            let o = reference::tolerance(&f32_out, &oracle, 0.0);
            // Where queries (and keys) are projected first, two products in turn are rounded.
            let products = match p.similarity {
                Similarity::Bilinear { .. } | Similarity::Additive { .. } => 2.0,
                _ => 1.0,
            };
            let lse = products * EPSILON * score;
            return Self { o, lse, weights: lse.min(1e-4), oracle };
        }
        // FlashAttention's rule: twice what plain code in that precision is wrong by. lse and the
        // weights are f32 on every path and get the same.
        let naive = reference::naive(p, &inputs).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let error = |naive: &[f64], oracle: &[f64]| reference::max_error(naive.iter().copied(), oracle);
        let o = reference::tolerance(p, &oracle, error(&naive.o, &oracle.o));
        let lse = 2.0 * error(&naive.lse, &oracle.lse) + 1e-5 * score;
        let weights = match (&naive.weights, &oracle.weights) {
            (Some(naive), Some(oracle)) => 2.0 * error(naive, oracle) + 1e-5,
            _ => 0.0,
        };
        Self { o, lse, weights, oracle }
    }

    /// Widens every budget: for laws that compare two roundings with each other.
    pub fn times(mut self, factor: f64) -> Self {
        (self.o, self.lse, self.weights) = (self.o * factor, self.lse * factor, self.weights * factor);
        self
    }

    /// The largest error in o as a share of its budget, or what is wrong.
    pub fn check(&self, case: &Case, got: &Outputs, gap: Gap) -> Result<f64, String> {
        let (p, loose) = (&case.problem, case.has_infinity);
        if let Some(want) = self.oracle.weights.as_ref().filter(|_| p.weights) {
            let got = got.weights.as_deref().ok_or("no weights")?;
            each("weights", got, want, p.shape(Operand::Weights), loose, |_| self.weights)?;
        }
        if p.lse {
            let got = got.lse.as_deref().ok_or("no lse")?;
            let score = self.oracle.max_score.max(1.0);
            each("lse", got, &self.oracle.lse, p.shape(Operand::Lse), loose, |want| {
                self.lse * (want.abs() / score).max(1.0)
            })?;
        }
        if p.lse != got.lse.is_some() || p.weights != got.weights.is_some() {
            return Err("an output that was not asked for".into());
        }

        check_gaps(case, got, gap)?;
        let rounding = narrowing(p.dtype, p.out_dtype);
        let o = got.o_contiguous(p);
        each("o", &o, &self.oracle.o, p.shape(Operand::O), loose, |want| {
            self.o + rounding * (want.abs() + 1e-4)
        })?;
        let share = o.iter().zip(&self.oracle.o).map(|(&got, want)| {
            (f64::from(got) - want).abs() / (self.o + rounding * (want.abs() + 1e-4)).max(f64::MIN_POSITIVE)
        });
        Ok(share.filter(|e| e.is_finite()).fold(0.0, f64::max))
    }
}

/// The relative error of rounding a result once to an output type that is not the storage type.
fn narrowing(from: Dtype, to: Dtype) -> f64 {
    match to {
        _ if from == to => 0.0,
        Dtype::F16 => 2f64.powi(-11),
        Dtype::Bf16 => 2f64.powi(-8),
        // f32, or no type of a result.
        _ => 0.0,
    }
}

/// Compares element by element; equal infinities and two NaNs are equal, and where `loose` all that
/// is not finite is.
fn each(
    what: &str,
    got: &[f32],
    want: &[f64],
    shape: [usize; 4],
    loose: bool,
    budget: impl Fn(f64) -> f64,
) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{what} has {} elements, {} expected", got.len(), want.len()));
    }
    let mut wrong = 0;
    let mut first = String::new();
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got);
        let alike = if loose { !got.is_finite() && !want.is_finite() } else { got.is_nan() && want.is_nan() };
        let fine = got == want || alike || (got - want).abs() <= budget(want);
        if !fine {
            if wrong == 0 {
                let at = indices(shape).nth(i).unwrap_or_default();
                first = format!("{what}{at:?} is {got:e}, expected {want:e} +- {:e}", budget(want));
            }
            wrong += 1;
        }
    }
    if wrong > 0 { Err(format!("{first} ({wrong} of {} are wrong)", want.len())) } else { Ok(()) }
}

/// o is as long as its layout reaches, every element of it is written and nothing else is.
fn check_gaps(case: &Case, got: &Outputs, gap: Gap) -> Result<(), String> {
    let (p, o) = (&case.problem, got.o.as_ref());
    let extent = p.extent(Operand::O) as usize;
    if o.len() != extent || o.dtype() != p.out_dtype {
        return Err(format!("o has {} {}, its layout reaches {extent} {}", o.len(), o.dtype(), p.out_dtype));
    }
    let mut written = vec![false; extent];
    for at in indices(p.shape(Operand::O)) {
        written[p.o.index(at)] = true;
    }
    let poison = poison(p.out_dtype);
    for (i, element) in o.bytes().chunks(p.out_dtype.bytes()).enumerate() {
        let is_poison = element == poison;
        match (written[i], gap) {
            (true, Gap::Poison) if is_poison => return Err(format!("o: element {i} was never written")),
            (false, Gap::Poison) if !is_poison => return Err(format!("o: gap {i} was overwritten")),
            (false, Gap::Zero) if element.iter().any(|&byte| byte != 0) => {
                return Err(format!("o: gap {i} is not zero"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether all outputs are the same, bit for bit.
pub fn same_bits(a: &Outputs, b: &Outputs) -> bool {
    let bits = |x: &Option<Vec<f32>>| x.as_ref().map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    a.o.as_ref().bytes() == b.o.as_ref().bytes()
        && bits(&a.lse) == bits(&b.lse)
        && bits(&a.weights) == bits(&b.weights)
}
