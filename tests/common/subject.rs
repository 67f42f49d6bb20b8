//! The things under test behind one call: the oracle (to prove the harness), the CPU path, and the
//! GPU paths on every device kind, kernel family, shader mode and way in.

use wgpu_attention::{Dtype, Error, Family, Outputs, Path, PlanOptions, Similarity, Tensor, Tile, reference};

use super::case::Case;
use super::check::{Expected, Gap};
use super::gpu::{self, Door, Kind};
use super::rng::every;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Subject {
    Oracle,
    #[cfg(feature = "cpu")]
    Cpu,
    Gpu {
        kind: Kind,
        checks: bool,
        family: Option<Family>,
        door: Door,
        /// Forces splits of the keys on a family that can.
        split: bool,
    },
}

/// What came of a run. Not being served is an answer that tests count, never a silent skip.
pub enum Outcome {
    Done(Box<Outputs>, Gap),
    Unsupported(String),
}

impl Subject {
    /// The CPU path, and every GPU subject that this machine has.
    pub fn all() -> Vec<Self> {
        let mut all = Self::cpu();
        all.extend(Self::gpus());
        all
    }

    pub fn cpu() -> Vec<Self> {
        vec![
            #[cfg(feature = "cpu")]
            Self::Cpu,
        ]
    }

    /// Device kinds x shader modes x families, the ways in taking turns.
    pub fn gpus() -> Vec<Self> {
        let mut doors = [Door::Encode, Door::Run, Door::Pass, Door::Pieces].into_iter().cycle();
        let mut all = Vec::new();
        for (kind, gpu) in [Kind::Full, Kind::Minimal].map(|kind| (kind, gpu::get(kind, true))) {
            let Some(gpu) = gpu else { continue };
            for checks in [false, true] {
                for family in gpu.families().map(Some).chain([None]) {
                    let door = doors.next().unwrap_or(Door::Encode);
                    all.push(Self::Gpu { kind, checks, family, door, split: false });
                }
            }
        }
        all
    }

    /// The CPU path and each family once, on opposite device kinds: for tests that have many cases.
    pub fn few() -> Vec<Self> {
        let mut few = Self::cpu();
        let (Some(full), Some(minimal)) = (gpu::get(Kind::Full, true), gpu::get(Kind::Minimal, true)) else {
            return few;
        };
        let mut kinds = [(Kind::Full, false), (Kind::Minimal, true)].into_iter().cycle();
        few.extend(full.families().map(|family| {
            let turn = kinds.next().unwrap_or((Kind::Full, false));
            let (kind, checks) =
                if minimal.families().any(|of| of == family) { turn } else { (Kind::Full, turn.1) };
            Self::Gpu {
                kind,
                checks,
                family: Some(family),
                door: Door::Encode,
                split: !checks && family.path() == Path::Fused,
            }
        }));
        few
    }

    /// Whether it makes the weights, if asked: a kernel without a score matrix does not.
    pub fn gives_weights(self) -> bool {
        !matches!(self, Self::Gpu { family: Some(family), .. } if family.path() == Path::Fused)
    }

    /// Whether it takes tensors of that type: matrix units want f16.
    pub fn takes(self, dtype: Dtype) -> bool {
        dtype == Dtype::F16 || !matches!(self, Self::Gpu { family: Some(Family::FusedMatrix), .. })
    }

    /// The case as this subject is asked it: the rest of it where it gives no weights, and in f16 where it
    /// takes nothing else.
    pub fn asked(self, case: &Case) -> Case {
        let mut case = if self.takes(case.problem.dtype) { case.clone() } else { case.in_f16() };
        case.problem.weights &= self.gives_weights();
        case
    }

    /// Whether its kernels compute the case's similarity: additive scores are none of the fused ones'.
    pub fn compares(self, case: &Case) -> bool {
        let additive = matches!(case.problem.similarity, Similarity::Additive { .. });
        let fused = matches!(self, Self::Gpu { family: Some(family), .. } if family.path() == Path::Fused);
        !(additive && fused)
    }

    /// The same, with another family of the plan's choice where its own does not compare so.
    pub fn that_compares(self, case: &Case) -> Self {
        match self {
            Self::Gpu { kind, checks, door, split, .. } if !self.compares(case) => {
                Self::Gpu { kind, checks, family: None, door, split }
            }
            _ => self,
        }
    }

    /// The same with its keys in splits, if it is the family's turn and it can.
    fn in_splits(self, turn: usize) -> Self {
        match self {
            Self::Gpu { kind, checks, family: Some(family), door, .. } if family.path() == Path::Fused => {
                let place = Family::ALL.iter().position(|of| *of == family).unwrap_or(0);
                let split = (turn + place) % 2 == 1;
                Self::Gpu { kind, checks, family: Some(family), door, split }
            }
            other => other,
        }
    }

    fn plan_options(family: Option<Family>, kind: Kind, split: bool) -> PlanOptions {
        // The row kernel reads keys and values as they are, or unpacked: both on each kind of device, in turn.
        let unpacked = Some(((kind == Kind::Minimal) == split).into());
        let tile =
            (family == Some(Family::FusedRow)).then_some(Tile { unpacked, ..Tile::of(Family::FusedRow) });
        // Where lengths lie on the GPU, splits without keys are not even launched.
        PlanOptions { family, tile, splits: split.then_some(3), indirect: split, ..PlanOptions::default() }
    }

    /// Whether its kernel fits the case, by the plan alone.
    pub fn serves(self, case: &Case) -> bool {
        let Self::Gpu { kind, checks, family, split, .. } = self else { return true };
        let gpu = gpu::get(kind, checks).expect("subjects are listed where there is an adapter");
        let planned =
            gpu.attention.plan_with(&self.asked(case).problem, &Self::plan_options(family, kind, split));
        !matches!(planned, Err(Error::KernelUnfit { .. }))
    }

    pub fn run(self, case: &Case) -> Result<Outcome, Error> {
        self.run_within(case, None)
    }

    /// With a budget for scratch memory, where the subject has any.
    pub fn run_within(self, case: &Case, scratch_budget: Option<u64>) -> Result<Outcome, Error> {
        match self {
            Self::Oracle => Ok(Outcome::Done(Box::new(oracle_outputs(case)?), Gap::Zero)),
            #[cfg(feature = "cpu")]
            Self::Cpu => {
                let out = wgpu_attention::cpu::attention(&case.problem, &case.data.inputs())?;
                Ok(Outcome::Done(Box::new(out), Gap::Zero))
            }
            Self::Gpu { kind, checks, family, door, split } => {
                let gpu = gpu::get(kind, checks).expect("subjects are listed where there is an adapter");
                let options = PlanOptions { scratch_budget, ..Self::plan_options(family, kind, split) };
                match gpu.run(case, &options, door) {
                    Ok((out, gap)) => Ok(Outcome::Done(Box::new(out), gap)),
                    // A kernel that was forced may not fit; the plan's own choice always does.
                    Err(e @ Error::KernelUnfit { .. }) if family.is_some() => {
                        Ok(Outcome::Unsupported(e.to_string()))
                    }
                    Err(e) => Err(e),
                }
            }
        }
    }

    /// Runs and compares: the error as a share of the budget, or `None` if the subject does not
    /// serve the case, or what went wrong.
    pub fn check(self, case: &Case, expected: &Expected) -> Result<Option<f64>, String> {
        let fail = |what: String| format!("{self:?}: {what}\n  {}", case.name);
        let own = (!self.takes(case.problem.dtype)).then(|| Expected::of(&case.in_f16()));
        let expected = own.as_ref().unwrap_or(expected);
        let case = self.asked(case);
        match self.run(&case) {
            Ok(Outcome::Done(out, gap)) => expected.check(&case, &out, gap).map(Some).map_err(fail),
            Ok(Outcome::Unsupported(_)) => Ok(None),
            Err(e) => Err(fail(e.to_string())),
        }
    }

    /// Checks the case and gives its outputs.
    ///
    /// # Panics
    /// When the outputs are outside the budget.
    pub fn outputs(self, case: &Case) -> Option<Outputs> {
        let case = &self.asked(case);
        match self.run(case) {
            Ok(Outcome::Done(out, gap)) => {
                if let Err(what) = Expected::of(case).check(case, &out, gap) {
                    panic!("{self:?}: {what}\n  {}", case.name);
                }
                Some(*out)
            }
            Ok(Outcome::Unsupported(_)) => None,
            Err(e) => panic!("{self:?}: {e}\n  {}", case.name),
        }
    }
}

/// The oracle as if it were a path: proves that the harness accepts what is right.
fn oracle_outputs(case: &Case) -> Result<Outputs, Error> {
    let p = &case.problem;
    let reference = reference::oracle(p, &case.data.inputs())?;
    let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
    let mut o = Tensor::zeros(p.out_dtype, p.extent(wgpu_attention::Operand::O) as usize);
    for (at, x) in super::case::indices(p.shape(wgpu_attention::Operand::O)).zip(reference.o) {
        o.set(p.o.index(at), x as f32);
    }
    Ok(Outputs { o, lse: p.lse.then(|| narrow(reference.lse)), weights: reference.weights.map(narrow) })
}

/// The share of the subjects that is a case's turn: its GPU subjects take turns where [`every`] case cannot try
/// all of them.
fn in_turn(number: usize, subjects: &[Subject]) -> Vec<Subject> {
    let gpus = subjects.iter().filter(|subject| matches!(subject, Subject::Gpu { .. })).count();
    let every = every().min(gpus.max(1));
    let mut turn = number;
    let taken = subjects.iter().filter(|subject| {
        turn += usize::from(matches!(subject, Subject::Gpu { .. }));
        !matches!(subject, Subject::Gpu { .. }) || turn.is_multiple_of(every)
    });
    // Every family splits the keys of every other of its cases.
    taken.map(|subject| subject.in_splits(number / every)).collect()
}

/// Runs `cases` on their subjects with as many threads as there are cores, and reports up to ten
/// failures. Each forced kernel family has to serve at least half of what it was given.
///
/// # Panics
/// When there was any.
pub fn check_all(what: &str, cases: &[(Case, Vec<Subject>)]) {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    let fail_fast = std::env::var_os("WGPU_ATTENTION_FAIL_FAST").is_some();
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let served = Mutex::new(Vec::<(Subject, usize, usize)>::new());
    let worst = Mutex::new(0.0_f64);
    let lock = |what| -> std::sync::MutexGuard<'_, Vec<String>> { what };
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some((case, subjects)) = cases.get(number) else { break };
            let expected = Expected::of(case);
            for subject in in_turn(number, subjects) {
                let result = subject.check(case, &expected);
                let mut served = served.lock().unwrap_or_else(|e| e.into_inner());
                let entry = served.iter().position(|(of, ..)| same_kernels(*of, subject));
                let entry = entry.unwrap_or_else(|| {
                    served.push((subject, 0, 0));
                    served.len() - 1
                });
                served[entry].2 += 1;
                match result {
                    Ok(None) => {}
                    Ok(Some(share)) => {
                        served[entry].1 += 1;
                        let mut worst = worst.lock().unwrap_or_else(|e| e.into_inner());
                        *worst = worst.max(share);
                    }
                    Err(failure) => {
                        served[entry].1 += 1;
                        let mut failures = lock(failures.lock().unwrap_or_else(|e| e.into_inner()));
                        failures.push(failure);
                        if fail_fast || failures.len() >= 10 {
                            next.store(cases.len(), Ordering::Relaxed);
                        }
                    }
                }
            }
        }
    };
    // wgpu panics when two threads wait a second for each other on OpenGL's one context.
    let gl = gpu::get(Kind::Full, true).is_some_and(|gpu| gpu.attention.caps().backend == wgpu::Backend::Gl);
    let threads = if gl { 1 } else { std::thread::available_parallelism().map_or(1, usize::from) };
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for handle in handles {
            if let Err(panic) = handle.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });

    let failures = failures.into_inner().unwrap_or_else(|e| e.into_inner());
    let served = served.into_inner().unwrap_or_else(|e| e.into_inner());
    let runs: usize = served.iter().map(|(.., of)| of).sum();
    super::say(&format!(
        "{what}: {} cases, {runs} runs, worst error {:.2} of its budget",
        cases.len(),
        worst.into_inner().unwrap_or_else(|e| e.into_inner())
    ));
    for (subject, done, of) in &served {
        if done < of {
            super::say(&format!("{what}: {subject:?} serves {done} of {of}"));
        }
    }
    assert!(failures.is_empty(), "{what}: {} failures\n{}", failures.len(), failures.join("\n"));
    for (subject, done, of) in served {
        assert!(2 * done >= of, "{what}: {subject:?} serves only {done} of {of}");
    }
}

/// Whether two subjects run the same kernels, whatever the way in and the device.
fn same_kernels(a: Subject, b: Subject) -> bool {
    match (a, b) {
        (Subject::Gpu { family: a, .. }, Subject::Gpu { family: b, .. }) => a == b,
        _ => a == b,
    }
}
