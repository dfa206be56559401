// Where everything in the editor of cells stands on its canvas, and what lies at a point of it.
import { sheetOf } from "./grids.js"

const GAP = 8 // pixels between the tiles of a batch and what is below, and between two pictures
const SHARE = 0.36 // of the height, at most, for the tiles

/** The batch whose tiles are shown. */
export const batchOf = (grid) => grid.batch ?? grid

/**
 * Where everything stands: {boxes, large, base}. `boxes` are those of a batch's tiles, `large` that
 * of the grid whose cells are marked, `base` that of the one they are pasted into, if there is one.
 */
export function placesOf(grid, width, height) {
  const { boxes, top } = sheetIn(grid, width, height * SHARE)
  const grids = grid.base ? [grid, grid.base] : [grid]
  const [large, base] = packed(grids, top, width, height - top)
  return { boxes, large, base }
}

/** The boxes of the tiles, if there are several, and the top of what is below. */
function sheetIn(grid, width, most) {
  const { rows, columns, count } = batchOf(grid)
  if (count === 1) return { boxes: [], top: 0 }
  const { boxes, height } = sheetOf(count, rows, columns, width, most)
  return { boxes, top: height + GAP }
}

/** Boxes of grids with cells of one size, side by side or one below the other. */
function packed(grids, top, width, height) {
  const sum = (side) => grids.reduce((all, grid) => all + grid[side], 0)
  const most = (side) => Math.max(...grids.map((grid) => grid[side]))
  const gaps = GAP * (grids.length - 1)
  const beside = Math.min((width - gaps) / sum("columns"), height / most("rows"))
  const below = Math.min(width / most("columns"), (height - gaps) / sum("rows"))
  const scale = Math.max(1, beside, below)
  const isBeside = beside >= below
  let x = (width - scale * sum("columns") - gaps) / 2
  let y = top
  return grids.map(({ rows, columns }) => {
    const box = { x, y, width: scale * columns, height: scale * rows }
    if (isBeside) x += box.width + GAP
    else {
      box.x = (width - box.width) / 2
      y += box.height + GAP
    }
    return box
  })
}

/** The height with which the pictures fill the canvas' width, if they are not very tall. */
export function wantedHeight(grid, width) {
  const pictures = width * Math.min(grid.base ? 1.3 : 1.2, heightsOf(grid))
  return pictures + sheetIn(grid, width, (pictures * SHARE) / (1 - SHARE)).top
}

/** The heights of all pictures, one below the other, in units of their width. */
function heightsOf({ rows, columns, base }) {
  return base ? (rows + base.rows) / Math.max(columns, base.columns) : rows / columns
}

export const isIn = (box, x, y) =>
  x >= box.x && x < box.x + box.width && y >= box.y && y < box.y + box.height

/** The tile at a point, or -1. */
export const tileAt = ({ boxes }, x, y) => boxes.findIndex((box) => isIn(box, x, y))

/** The [row, column] of a grid in a box at a point, or the nearest one. */
export function cellAt(box, { rows, columns }, x, y) {
  const clamped = (share, count) => Math.max(0, Math.min(count - 1, Math.floor(share * count)))
  return [
    clamped((y - box.y) / box.height, rows),
    clamped((x - box.x) / box.width, columns),
  ]
}
