//! Which axis goes down a contact sheet, which across, and which pictures share one.

use std::collections::BTreeMap;

use super::super::results::Results;
use super::super::{Axis, Grid};
use crate::ops::Error;

/// The axes of a sheet's rows and columns, as far as they were named.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Layout {
    pub rows: Option<Axis>,
    pub columns: Option<Axis>,
}

/// A contact sheet: rows and columns of two axes, one value of every other.
#[derive(Debug, Clone, PartialEq)]
pub(in super::super) struct Sheet {
    /// The values of the other axes in words; empty if there are none.
    pub(in super::super) title: String,
    pub(in super::super) rows: Edge,
    pub(in super::super) columns: Edge,
    /// Places in the results' rows.
    pub(in super::super) cells: Vec<Vec<Option<usize>>>,
}

/// One side of a sheet.
#[derive(Debug, Clone, PartialEq)]
pub(in super::super) struct Edge {
    pub(in super::super) axis: Option<Axis>,
    pub(in super::super) values: Vec<String>,
}

impl Layout {
    /// From the axes' names.
    pub fn named(rows: Option<&str>, columns: Option<&str>) -> Result<Self, Error> {
        let axis = |field, name: Option<&str>| {
            let all = || Axis::ALL.map(Axis::name).join(", ");
            name.map(|name| Axis::named(name).ok_or_else(|| Error::invalid(field, &name, format!("an axis: {}", all()))))
                .transpose()
        };
        let layout = Self { rows: axis("rows", rows)?, columns: axis("columns", columns)? };
        if layout.rows.is_some() && layout.rows == layout.columns {
            return Err(Error::Combination {
                field: "rows",
                problem: "is the axis of the columns".into(),
                hint: "name two different axes".into(),
            });
        }
        Ok(layout)
    }

    /// An error for axes that this grid does not vary.
    pub(in super::super) fn check(self, grid: &Grid) -> Result<(), Error> {
        for (field, axis) in [("rows", self.rows), ("columns", self.columns)] {
            if let Some(axis) = axis.filter(|axis| grid.values(*axis).is_none()) {
                let has = grid.varied().map(|(axis, _)| axis.name()).collect::<Vec<_>>().join(", ");
                return Err(Error::invalid(field, &axis, format!("an axis of the run: {has}")));
            }
        }
        Ok(())
    }

    /// The axes that were not named are those with most values, chance and prompts last; the longest goes across.
    fn sides(self, grid: &Grid) -> (Option<Axis>, Option<Axis>) {
        // Of axes that are walked in step the first stands for all.
        let leads = |axis: &Axis| grid.zips.iter().all(|zip| !zip.contains(axis) || zip.iter().min() == Some(axis));
        let mut free: Vec<(Axis, usize)> =
            grid.varied().map(|(axis, values)| (axis, values.len())).filter(|(axis, _)| leads(axis)).collect();
        free.retain(|(axis, _)| Some(*axis) != self.rows && Some(*axis) != self.columns);
        free.sort_by_key(|(axis, length)| (!axis.is_choice(), axis.is_chance(), usize::MAX - length));
        let mut free = free.into_iter().map(|(axis, _)| axis);
        match (self.rows, self.columns) {
            (None, None) => {
                let columns = free.next();
                (free.next(), columns)
            }
            (rows, columns) => (rows.or_else(|| free.next()), columns.or_else(|| free.next())),
        }
    }

    pub(in super::super) fn sheets(self, results: &Results) -> Vec<Sheet> {
        let grid = &results.manifest.grid;
        let (rows, columns) = self.sides(grid);
        let place = |axis: Option<Axis>| grid.axes.iter().position(|(has, _)| Some(*has) == axis);
        let (row, column) = (place(rows), place(columns));
        let in_step = |axis: Axis, with: Option<Axis>| {
            with == Some(axis) || grid.zips.iter().any(|zip| zip.contains(&axis) && with.is_some_and(|with| zip.contains(&with)))
        };
        let rest: Vec<usize> = (0..grid.axes.len())
            .filter(|i| grid.axes[*i].1.len() > 1 && !in_step(grid.axes[*i].0, rows) && !in_step(grid.axes[*i].0, columns))
            .collect();
        let edge = |axis: Option<Axis>, place: Option<usize>| Edge {
            axis,
            values: place.map_or(vec![String::new()], |i| grid.axes[i].1.iter().map(ToString::to_string).collect()),
        };
        let (down, across) = (edge(rows, row), edge(columns, column));
        let mut sheets: BTreeMap<Vec<usize>, Sheet> = BTreeMap::new();
        for (i, found) in results.rows.iter().enumerate() {
            let key: Vec<usize> = rest.iter().map(|axis| found.at[*axis]).collect();
            let sheet = sheets.entry(key).or_insert_with(|| Sheet {
                title: rest
                    .iter()
                    .map(|axis| format!("{} {}", grid.axes[*axis].0, found.values[*axis].1))
                    .collect::<Vec<_>>()
                    .join(", "),
                rows: down.clone(),
                columns: across.clone(),
                cells: vec![vec![None; across.values.len()]; down.values.len()],
            });
            sheet.cells[row.map_or(0, |axis| found.at[axis])][column.map_or(0, |axis| found.at[axis])] = Some(i);
        }
        sheets.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(axes: &[(Axis, &str)], zips: Vec<Vec<Axis>>) -> Grid {
        Grid::new(axes.iter().map(|(axis, text)| (*axis, axis.numbers(text).unwrap())).collect(), zips).unwrap()
    }

    #[test]
    fn choices_come_before_chance_and_the_longest_goes_across() {
        let sides = |grid: &Grid| Layout::default().sides(grid);
        let full = grid(&[(Axis::Guidance, "1,2,3"), (Axis::Steps, "4,10,20,40"), (Axis::Seed, "1:9")], Vec::new());
        assert_eq!(sides(&full), (Some(Axis::Guidance), Some(Axis::Steps)));
        let one = grid(&[(Axis::Guidance, "1,2,3"), (Axis::Seed, "1:9")], Vec::new());
        assert_eq!(sides(&one), (Some(Axis::Seed), Some(Axis::Guidance)));
        assert_eq!(sides(&grid(&[(Axis::Seed, "1")], Vec::new())), (None, None));
        let zipped = grid(
            &[(Axis::Width, "64,128"), (Axis::Height, "128,64"), (Axis::Seed, "1:3")],
            vec![vec![Axis::Width, Axis::Height]],
        );
        assert_eq!(sides(&zipped), (Some(Axis::Seed), Some(Axis::Width)));
        let named = Layout::named(Some("seed"), None).unwrap();
        assert_eq!(named.sides(&full), (Some(Axis::Seed), Some(Axis::Steps)));
    }

    #[test]
    fn wrong_names_are_refused() {
        let message = |rows, columns| Layout::named(rows, columns).unwrap_err().to_string();
        assert!(message(Some("cfg"), None).contains("guidance"));
        assert!(message(Some("seed"), Some("seed")).contains("two different axes"));
        let one = grid(&[(Axis::Guidance, "1,2,3"), (Axis::Seed, "1:9")], Vec::new());
        assert!(Layout::named(Some("steps"), None).unwrap().check(&one).unwrap_err().to_string().contains("guidance, seed"));
    }
}
