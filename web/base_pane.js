// The grid that marked cells are pasted into, as it will be: drag them where they should go.
import { pasted } from "./cells.js"
import { STEPS } from "./cells_pane.js"
import { cellAt, isIn } from "./editor_places.js"
import { borderOf, drawBorder, drawEdges, drawMarked, drawLabel, drawTile } from "./grids.js"

/** The place of the source after so many cells; at least one of its cells stays in the base. */
function moved({ row, column, grid }, down, right) {
  const within = (value, length, of) => Math.max(1 - length, Math.min(of - 1, value))
  return {
    row: within(row + down, grid.rows, grid.base.rows),
    column: within(column + right, grid.columns, grid.base.columns),
  }
}

export class BasePane {
  pointer = "move"

  constructor(label) {
    this.label = label
  }

  isAt({ places }, x, y) {
    return isIn(places.base, x, y)
  }

  press(state, x, y) {
    const { grid, places } = state
    const [row, column] = cellAt(places.base, grid.base, x, y)
    return (toX, toY) => {
      const [toRow, toColumn] = cellAt(places.base, grid.base, toX, toY)
      return moved(state, toRow - row, toColumn - column)
    }
  }

  key(state, { key, altKey }) {
    if (altKey && STEPS[key]) return () => moved(state, ...STEPS[key])
  }

  draw(context, { grid, places, taken, marks, row, column, stale }) {
    const { base, tiles } = grid
    const box = places.base
    const tileOf = (all) => all[Math.min(taken, all.length - 1)]
    const side = box.width / base.columns
    const source = {
      x: box.x + column * side,
      y: box.y + row * side,
      width: grid.columns * side,
      height: grid.rows * side,
    }
    drawTile(context, tileOf(base.tiles), box)
    context.save()
    context.beginPath()
    context.rect(box.x, box.y, box.width, box.height)
    context.clip()
    drawMarked(context, tileOf(tiles), marks, grid.rows, grid.columns, source)
    context.setLineDash([4, 4])
    context.strokeStyle = "#fff8"
    context.lineWidth = 1
    context.strokeRect(source.x, source.y, source.width, source.height)
    context.restore()
    drawEdges(context, base.rows, base.columns, box)
    const landed = pasted(marks, grid, base, row, column)
    const border = borderOf(landed, base.rows, base.columns)
    drawBorder(context, border, base.columns, box, { dashed: stale })
    drawLabel(context, this.label, box)
  }
}
