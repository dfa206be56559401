// Draws what the editor of cells shows: all layouts as small tiles, and the one taken enlarged.
// Nothing here knows the page or the node.
import {
  borderOf,
  dimOthers,
  drawBorder,
  drawFrame,
  drawNumber,
  drawTile,
  sheetOf,
} from "./grids.js"

const GAP = 8 // pixels between the sheet and the large picture
const SHARE = 0.36 // of the height, at most, for the sheet
const FINE = 8 // pixels of a cell from which its edges are drawn

/** Where everything stands in a canvas: {boxes, large}. */
export function placesOf(grid, width, height) {
  const { rows, columns, count } = grid
  const sheet =
    count > 1
      ? sheetOf(count, rows, columns, width, height * SHARE)
      : { boxes: [], height: -GAP }
  const top = sheet.height + GAP
  const scale = Math.max(1, Math.min(width / columns, (height - top) / rows))
  const large = { y: top, width: scale * columns, height: scale * rows }
  return { boxes: sheet.boxes, large: { x: (width - large.width) / 2, ...large } }
}

/** The height with which the large picture is as wide as the canvas, if it is not very tall. */
export function wantedHeight(grid, width) {
  const large = width * Math.min(1.2, grid.rows / grid.columns)
  return grid.count > 1 ? (large + GAP) / (1 - SHARE) : large
}

/** The tile at a point, or -1. */
export const tileAt = ({ boxes }, x, y) => boxes.findIndex((box) => isIn(box, x, y))

export const isIn = (box, x, y) =>
  x >= box.x && x < box.x + box.width && y >= box.y && y < box.y + box.height

/** The [row, column] at a point, or the nearest one. */
export function cellAt({ large }, grid, x, y) {
  const clamped = (value, count) => Math.max(0, Math.min(count - 1, Math.floor(value)))
  return [
    clamped(((y - large.y) / large.height) * grid.rows, grid.rows),
    clamped(((x - large.x) / large.width) * grid.columns, grid.columns),
  ]
}

/** The tiles with their numbers, on a canvas of their own that is copied in every frame. */
export function renderSheet(grid, pictures, places, ratio, width) {
  const canvas = document.createElement("canvas")
  const bottom = places.boxes.at(-1).y + places.boxes.at(-1).height
  canvas.width = Math.ceil(width * ratio)
  canvas.height = Math.ceil(bottom * ratio)
  const context = canvas.getContext("2d")
  context.scale(ratio, ratio)
  places.boxes.forEach((box, i) => {
    drawTile(context, pictures[i] ?? grid.tiles[i], box)
    drawNumber(context, i, box)
  })
  return canvas
}

/**
 * One frame.
 * `state`: {taken, marks, bright, cursor, stale, accent}; `marks` are outlined, `bright` are the
 * cells that stay, all if none is marked; `taken` is an index, or -1 for all.
 */
export function drawEditor(context, grid, pictures, places, sheet, state) {
  const { rows, columns } = grid
  const { boxes, large } = places
  const border = borderOf(state.marks, rows, columns)
  if (sheet) {
    const bottom = boxes.at(-1).y + boxes.at(-1).height
    const width = (sheet.width * bottom) / sheet.height
    context.drawImage(sheet, 0, 0, width, bottom)
  }
  boxes.forEach((box, i) => {
    if (state.taken >= 0 && state.taken !== i) return
    drawBorder(context, border, columns, box, { width: 1, dashed: state.stale })
    drawFrame(context, box, state.accent)
  })
  const shown = Math.max(0, state.taken)
  if (!grid.tiles[shown]) return
  drawTile(context, pictures[shown] ?? grid.tiles[shown], large)
  if (state.bright) dimOthers(context, state.bright, rows, columns, large)
  drawCellEdges(context, rows, columns, large)
  drawBorder(context, border, columns, large, { dashed: state.stale })
  if (state.cursor) {
    const [row, column] = state.cursor
    const side = large.width / columns
    const box = { x: large.x + column * side, y: large.y + row * side, width: side, height: side }
    drawFrame(context, box, state.accent, 2)
  }
}

function drawCellEdges(context, rows, columns, box) {
  const side = box.width / columns
  if (side < FINE) return
  context.beginPath()
  for (let row = 1; row < rows; row++) {
    context.moveTo(box.x, box.y + row * side)
    context.lineTo(box.x + box.width, box.y + row * side)
  }
  for (let column = 1; column < columns; column++) {
    context.moveTo(box.x + column * side, box.y)
    context.lineTo(box.x + column * side, box.y + box.height)
  }
  context.strokeStyle = "#8884"
  context.lineWidth = 0.5
  context.stroke()
}
