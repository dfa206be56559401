// The grid whose cells are marked in the editor: rectangles, a brush, and keys.
import { withLine, withRectangle } from "./cells.js"
import { cellAt, isIn } from "./editor_places.js"
import { borderOf, dimOthers, drawBorder, drawEdges, drawFrame, drawLabel, drawTile } from "./grids.js"

export const STEPS = {
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
}

export class CellsPane {
  pointer = "crosshair"
  cursor = null // of the keys
  anchor = null // where the rectangle begins that keys choose
  hovered = null

  constructor(label = "") {
    this.label = label
  }

  isAt({ places }, x, y) {
    return isIn(places.large, x, y)
  }

  press({ grid, places, tool, value, start, naming }, x, y, shift) {
    const set = shift ? 0 : value
    const before = start(set)
    const from = cellAt(places.large, grid, x, y)
    let [marks, last] = [before, from]
    return (toX, toY) => {
      const cell = cellAt(places.large, grid, toX, toY)
      marks =
        tool === "brush"
          ? withLine(marks, grid.columns, last, cell, set)
          : withRectangle(before, grid.columns, from, cell, set)
      last = cell
      return naming(marks)
    }
  }

  hover(state, x, y) {
    this.hovered = this.isAt(state, x, y) ? cellAt(state.places.large, state.grid, x, y) : null
  }

  leave() {
    this.cursor = this.anchor = this.hovered = null
  }

  key(state, { key, shiftKey, altKey }) {
    if (altKey) return undefined
    if (STEPS[key]) return () => this.step(state.grid, STEPS[key], shiftKey)
    const set = shiftKey ? 0 : state.value
    const value = { " ": set, Enter: set, Delete: 0 }[key]
    return this.cursor && value !== undefined ? () => this.fill(state, value) : undefined
  }

  step({ rows, columns }, [down, right], extend) {
    const [row, column] = this.cursor ?? [-down, -right]
    const next = [
      Math.max(0, Math.min(rows - 1, row + down)),
      Math.max(0, Math.min(columns - 1, column + right)),
    ]
    this.anchor = extend ? (this.anchor ?? this.cursor ?? next) : null
    this.cursor = this.hovered = next
  }

  fill({ grid, start, naming }, value) {
    const from = this.anchor ?? this.cursor
    return naming(withRectangle(start(value), grid.columns, from, this.cursor, value))
  }

  draw(context, { grid, pictures, places, taken, marks, kept, stale, accent }) {
    const { rows, columns, tiles } = grid
    const box = places.large
    const shown = Math.max(0, Math.min(taken, tiles.length - 1))
    drawTile(context, pictures[shown] ?? tiles[shown], box)
    if (kept) dimOthers(context, kept, rows, columns, box)
    drawEdges(context, rows, columns, box)
    const outlined = this.anchor
      ? withRectangle(marks, columns, this.anchor, this.cursor, 1) // before it is filled
      : marks
    drawBorder(context, borderOf(outlined, rows, columns), columns, box, { dashed: stale })
    if (this.label) drawLabel(context, this.label, box)
    if (!this.cursor) return
    const [row, column] = this.cursor
    const side = box.width / columns
    const cell = { x: box.x + column * side, y: box.y + row * side, width: side, height: side }
    drawFrame(context, cell, accent, 2)
  }
}
