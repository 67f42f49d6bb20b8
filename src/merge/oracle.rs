//! The merge in f64, row by row: what the kernel is held to.

use super::{MOST_PARTIALS, MergeProblem};
use crate::dtype::TensorRef;
use crate::error::{Error, Operand, Result};

/// What [`merge_states`] gives, in logical order and f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Merged {
    /// `[batch, heads_q, seq_q, head_dim_v]`.
    pub o: Vec<f64>,
    /// `[batch, heads_q, seq_q]`, natural logarithm; also where the problem does not ask for it.
    pub lse: Vec<f64>,
}

/// The merge of [`MergeProblem`] in f64. `partials` holds o and lse for each entry of
/// [`MergeProblem::partials`].
///
/// ```
/// use wgpu_attention::{MergeProblem, Partials, reference};
/// // A part that weighs three times as much as the other, and one that has seen no key.
/// let problem = MergeProblem::new(vec![Partials::stacked(3, 1, 1, 1, 1)], 1, 1, 1, 1);
/// let (o, lse) = ([1.0_f32, 5.0, f32::NAN], [3.0_f32.ln(), 0.0, f32::NEG_INFINITY]);
/// let merged = reference::merge_states(&problem, &[((&o[..]).into(), &lse)])?;
/// assert!((merged.o[0] - 2.0).abs() < 1e-6);
/// assert!((merged.lse[0] - 4.0_f64.ln()).abs() < 1e-6);
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
///
/// # Errors
/// Those of [`MergeProblem::validate`], and [`Error::Partials`] with [`Error::MissingOperand`],
/// [`Error::UnexpectedOperand`], [`Error::DtypeMismatch`] or [`Error::OutOfBounds`].
pub fn merge_states(problem: &MergeProblem, partials: &[(TensorRef<'_>, &[f32])]) -> Result<Merged> {
    check(problem, partials)?;
    let p = problem;
    let mut merged = Merged { o: Vec::with_capacity(p.rows() * p.head_dim_v), lse: Vec::new() };
    for row in 0..p.rows() {
        let at = [row / p.seq_q / p.heads_q, row / p.seq_q % p.heads_q, row % p.seq_q, 0];
        // Each part's lse, and its o with the place of the row's first element and the step to the next.
        let parts: Vec<_> = p
            .partials
            .iter()
            .zip(partials)
            .flat_map(|(of, &(o, lse))| {
                (0..of.parts).map(move |part| {
                    let lse = f64::from(lse[of.lse.index(at) + part * of.lse_step]);
                    (lse, o, of.o.index(at) + part * of.o_step, of.o.strides[3])
                })
            })
            .filter(|&(lse, ..)| lse != f64::NEG_INFINITY)
            .collect();
        // f64::max would hide a NaN.
        let max = parts
            .iter()
            .fold(f64::NEG_INFINITY, |max, &(lse, ..)| if lse > max || lse.is_nan() { lse } else { max });
        let weight = |lse: f64| (lse - max).exp();
        let sum: f64 = parts.iter().map(|&(lse, ..)| weight(lse)).sum();
        merged.lse.push(if parts.is_empty() { f64::NEG_INFINITY } else { max + sum.ln() });
        merged.o.extend((0..p.head_dim_v).map(|d| {
            let weighted = |&(lse, o, at, step): &(f64, TensorRef<'_>, usize, usize)| {
                weight(lse) * f64::from(o.get(at + d * step))
            };
            if parts.is_empty() { 0.0 } else { parts.iter().map(weighted).sum::<f64>() / sum }
        }));
    }
    Ok(merged)
}

fn check(problem: &MergeProblem, partials: &[(TensorRef<'_>, &[f32])]) -> Result<()> {
    problem.validate()?;
    for at in 0..MOST_PARTIALS.max(partials.len()) {
        let operand = Operand::O;
        let pair = operand.brought(at < problem.partials.len(), partials.get(at));
        let Some(&(o, lse)) = pair.map_err(|error| error.of_partials(Some(at)))? else { continue };
        let (need, got) = (problem.dtype, o.dtype());
        if need != got {
            return Err(Error::DtypeMismatch { operand, need, got }.of_partials(Some(at)));
        }
        for (operand, len) in [(Operand::O, o.len()), (Operand::Lse, lse.len())] {
            let need = problem.extent(Some(at), operand) as u64;
            if need > len as u64 {
                let (got, unit, container) = (len as u64, "elements", "slice");
                let error = Error::OutOfBounds { operand, need, got, unit, container };
                return Err(error.of_partials(Some(at)));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::Partials;

    fn merge(o: &[f32], lse: &[f32], rows: usize) -> Merged {
        let parts = lse.len() / rows;
        let partials = Partials::stacked(parts, 1, 1, rows, o.len() / lse.len());
        let problem = MergeProblem::new(vec![partials], 1, 1, rows, o.len() / lse.len());
        merge_states(&problem, &[(o.into(), lse)]).unwrap()
    }

    #[test]
    fn rows_without_a_key_are_zero() {
        let none = f32::NEG_INFINITY;
        let m = merge(&[f32::NAN, 1.0, f32::INFINITY, 3.0], &[none, none, none, 0.5], 2);
        assert_eq!(m, Merged { o: vec![0.0, 3.0], lse: vec![f64::NEG_INFINITY, 0.5] });
    }

    #[test]
    fn nan_and_infinity_stay_in_their_row() {
        for bad in [f32::NAN, f32::INFINITY] {
            let m = merge(&[1.0, 2.0, 3.0, 4.0], &[bad, 0.0, 0.0, 0.0], 2);
            assert!(m.o[0].is_nan() && m.lse[0].is_nan());
            assert_eq!((m.o[1], m.lse[1]), (3.0, 2.0_f64.ln()));
        }
    }

    #[test]
    fn distant_logarithms_neither_overflow_nor_vanish() {
        let m = merge(&[1.0, 2.0], &[-3e38, 3e38], 1);
        assert_eq!((m.o[0], m.lse[0]), (2.0, f64::from(3e38_f32)));
        let m = merge(&[1.0, 3.0], &[-1e4, -1e4], 1);
        assert_eq!((m.o[0], m.lse[0]), (2.0, -1e4 + 2.0_f64.ln()));
    }

    #[test]
    fn slices_are_checked() {
        let problem = MergeProblem::new(vec![Partials::stacked(2, 1, 1, 2, 3)], 1, 1, 2, 3);
        let (o, lse) = ([0.0_f32; 12], [0.0_f32; 4]);
        let full = (TensorRef::from(&o[..]), &lse[..]);
        let of = |partials: &[(TensorRef<'_>, &[f32])]| match merge_states(&problem, partials) {
            Err(Error::Partials { at, error }) => (at, *error),
            other => panic!("{other:?}"),
        };
        assert!(merge_states(&problem, &[full]).is_ok());
        assert_eq!(of(&[]), (0, Error::MissingOperand { operand: Operand::O }));
        for extra in [1, 5] {
            let many = vec![full; 1 + extra];
            assert_eq!(of(&many), (1, Error::UnexpectedOperand { operand: Operand::O }));
        }
        let (unit, container) = ("elements", "slice");
        let short = (TensorRef::from(&o[..11]), &lse[..]);
        let error = Error::OutOfBounds { operand: Operand::O, need: 12, got: 11, unit, container };
        assert_eq!(of(&[short]), (0, error));
        let error = Error::OutOfBounds { operand: Operand::Lse, need: 4, got: 3, unit, container };
        assert_eq!(of(&[(full.0, &lse[..3])]), (0, error));
        let half = [half::f16::ONE; 12];
        let (need, got) = (crate::Dtype::F32, crate::Dtype::F16);
        let error = Error::DtypeMismatch { operand: Operand::O, need, got };
        assert_eq!(of(&[(TensorRef::from(&half[..]), &lse)]), (0, error));
    }
}
