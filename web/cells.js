// Cells of a grid as text and as marks, and what hands do to them. Nothing here knows the page.
// Marks are a Uint8Array of rows * columns, 1 where a cell is marked. The text is that of
// `glm_core/data/cells.py`: `0-7:0-3; 9:2` is rows 0 to 7 of columns 0 to 3, and one cell more.
const ALL = "*"
const RANGE = "(\\d{1,6})(?:\\s*-\\s*(\\d{1,6}))?"
const ENTRY = new RegExp(`^\\s*${RANGE}\\s*:\\s*${RANGE}\\s*$`)

/** The marks that a text names, or null if it does not fit the grid. */
export function parseCells(text, rows, columns) {
  const marks = new Uint8Array(rows * columns)
  if (text.trim() === ALL) return marks.fill(1)
  for (const entry of text.split(";").filter((part) => part.trim())) {
    const found = ENTRY.exec(entry)
    if (!found) return null
    const [top, bottom = top, left, right = left] = found.slice(1).map((n) => n && Number(n))
    if (bottom < top || right < left || bottom >= rows || right >= columns) return null
    for (let row = top; row <= bottom; row++)
      marks.fill(1, row * columns + left, row * columns + right + 1)
  }
  return marks
}

/** The one canonical text of marks. */
export function formatCells(marks, rows, columns) {
  if (marks.every(Boolean)) return ALL
  const groups = []
  for (let row = 0; row < rows; row++) {
    const spans = spansOf(marks.subarray(row * columns, (row + 1) * columns)).join()
    const last = groups.at(-1)
    if (last?.bottom === row - 1 && last.spans === spans) last.bottom = row
    else if (spans) groups.push({ top: row, bottom: row, spans })
  }
  return groups
    .flatMap(({ top, bottom, spans }) =>
      spans.split(",").map((columns) => `${span(top, bottom)}:${columns}`)
    )
    .join("; ")
}

function spansOf(line) {
  const spans = []
  for (let first = line.indexOf(1); first >= 0; ) {
    let end = line.indexOf(0, first)
    if (end < 0) end = line.length
    spans.push(span(first, end - 1))
    first = line.indexOf(1, end)
  }
  return spans
}

const span = (first, last) => (first === last ? `${first}` : `${first}-${last}`)

/** Marks with the rectangle between two [row, column] set to 1 or 0. */
export function withRectangle(marks, columns, [row, column], [otherRow, otherColumn], value) {
  const changed = marks.slice()
  const left = Math.min(column, otherColumn)
  const right = Math.max(column, otherColumn)
  for (let y = Math.min(row, otherRow); y <= Math.max(row, otherRow); y++)
    changed.fill(value, y * columns + left, y * columns + right + 1)
  return changed
}

/** Marks with the cells of a line between two [row, column] set, as a brush passes them. */
export function withLine(marks, columns, [row, column], [endRow, endColumn], value) {
  const changed = marks.slice()
  const steps = Math.max(Math.abs(endRow - row), Math.abs(endColumn - column), 1)
  for (let i = 0; i <= steps; i++) {
    const y = Math.round(row + ((endRow - row) * i) / steps)
    const x = Math.round(column + ((endColumn - column) * i) / steps)
    changed[y * columns + x] = value
  }
  return changed
}

/** Marks of one grid on another, the first of them at a row and column; what lies outside is lost. */
export function pasted(marks, from, to, row, column) {
  const landed = new Uint8Array(to.rows * to.columns)
  for (let y = Math.max(0, row); y < Math.min(to.rows, row + from.rows); y++)
    for (let x = Math.max(0, column); x < Math.min(to.columns, column + from.columns); x++)
      landed[y * to.columns + x] = marks[(y - row) * from.columns + x - column]
  return landed
}

export const inverted = (marks) => marks.map((mark) => 1 - mark)

export const countOf = (marks) => marks.reduce((sum, mark) => sum + mark, 0)

/** The marks that Lock Layout's `lock` sets without a mask; null where a mask decides. */
export function lockedBy(lock, given, rows, columns) {
  const marks = given.slice()
  if (lock === "whole") return marks.fill(1)
  if (lock === "none") return marks.fill(0)
  const down = Math.ceil(rows / 2)
  const across = Math.ceil(columns / 2)
  const box = {
    left: [0, rows, 0, across],
    right: [0, rows, across, columns],
    top: [0, down, 0, columns],
    bottom: [down, rows, 0, columns],
  }[lock]
  if (!box) return null
  const [top, bottom, left, right] = box
  for (let row = top; row < bottom; row++)
    marks.fill(1, row * columns + left, row * columns + right)
  return marks
}
