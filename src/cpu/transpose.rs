//! Matrices turned over.

/// Elements of a block's side: four rows are read and four written at a time, a vector of four each.
const SIDE: usize = 4;

/// `to[column * to_stride + row] = from[row * from_stride + column]`.
#[inline(always)]
pub(super) fn transpose(
    [rows, columns]: [usize; 2],
    from: &[f32],
    from_stride: usize,
    to: &mut [f32],
    to_stride: usize,
) {
    let [whole_rows, whole_columns] = [rows, columns].map(|n| n - n % SIDE);
    for row in (0..whole_rows).step_by(SIDE) {
        for column in (0..whole_columns).step_by(SIDE) {
            let mut block = [[0.0; SIDE]; SIDE];
            for (r, line) in block.iter_mut().enumerate() {
                line.copy_from_slice(&from[(row + r) * from_stride + column..][..SIDE]);
            }
            for c in 0..SIDE {
                let to = &mut to[(column + c) * to_stride + row..][..SIDE];
                to.iter_mut().zip(&block).for_each(|(to, line)| *to = line[c]);
            }
        }
    }
    for row in 0..rows {
        let first = if row < whole_rows { whole_columns } else { 0 };
        for column in first..columns {
            to[column * to_stride + row] = from[row * from_stride + column];
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_element_goes_to_its_place() {
        for shape in [[1, 1], [3, 5], [4, 4], [8, 7], [7, 8], [48, 128], [2, 9]] {
            let [rows, columns] = shape;
            let (from_stride, to_stride) = (columns + 1, rows + 2);
            let from: Vec<f32> = (0..rows * from_stride).map(|i| i as f32).collect();
            let mut to = vec![-1.0; columns * to_stride];
            super::transpose(shape, &from, from_stride, &mut to, to_stride);
            for (at, &got) in to.iter().enumerate() {
                let (column, row) = (at / to_stride, at % to_stride);
                let want = if row < rows { from[row * from_stride + column] } else { -1.0 };
                assert_eq!(got, want, "{shape:?}, row {row} and column {column}");
            }
        }
    }
}
