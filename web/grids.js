// Draws the grids of `nodes/grid_ui.py`: a batch as tiles, marked cells outlined.
// Nothing here knows the page; coordinates are those of the context that is drawn on.
import { parseCells } from "./cells.js"

const GAP = 4 // pixels between tiles
const DIM = 0.68 // how much darker cells are that will not stay
const FINE = 8 // pixels of a cell from which its edges are drawn

/**
 * A grid as it came from the server, ready to be drawn:
 * `tiles` are canvases of one pixel a cell, and `locked` are marks of `cells.js`.
 */
export function decodeGrid(grid) {
  const { rows, columns, count } = grid
  const colours = Uint8Array.from(atob(grid.colours), (letter) => letter.charCodeAt(0))
  const size = 3 * rows * columns
  const tiles = Array.from({ length: count }, (_, i) =>
    tile(colours.subarray(i * size, (i + 1) * size), rows, columns)
  )
  return { ...grid, tiles, locked: parseCells(grid.locked, rows, columns) }
}

/** A grid of which hands mark cells: `marked` and `given` as marks, and the first as text. */
export function decodeEditable(grid) {
  const { rows, columns } = grid
  const marked = parseCells(grid.marked, rows, columns)
  const given = parseCells(grid.given, rows, columns)
  return { ...decodeGrid(grid), marked, given, markedText: grid.marked }
}

function tile(colours, rows, columns) {
  const pixels = new Uint8ClampedArray(4 * rows * columns).fill(255)
  for (let i = 0; i < rows * columns; i++) pixels.set(colours.subarray(3 * i, 3 * i + 3), 4 * i)
  return canvasOf(new ImageData(pixels, columns, rows))
}

function canvasOf(image) {
  const canvas = document.createElement("canvas")
  canvas.width = image.width
  canvas.height = image.height
  canvas.getContext("2d").putImageData(image, 0, 0)
  return canvas
}

/**
 * Where `count` tiles stand on a sheet `width` wide: the fewest columns of tiles with which the
 * sheet is at most `most` high. Returns {height, boxes: [{x, y, width, height}]}.
 */
export function sheetOf(count, rows, columns, width, most) {
  let across = 1
  const sideAt = (n) => (width - GAP * (n - 1)) / n
  const heightAt = (n) => Math.ceil(count / n) * ((sideAt(n) * rows) / columns + GAP) - GAP
  while (across < count && heightAt(across) > most) across++
  const tileWidth = Math.min(sideAt(across), (most * columns) / rows)
  const tileHeight = (tileWidth * rows) / columns
  const boxes = Array.from({ length: count }, (_, i) => ({
    x: (i % across) * (tileWidth + GAP),
    y: Math.floor(i / across) * (tileHeight + GAP),
    width: tileWidth,
    height: tileHeight,
  }))
  return { height: Math.ceil(count / across) * (tileHeight + GAP) - GAP, boxes }
}

/** A tile or a picture of it, stretched over a box; cells keep sharp edges. */
export function drawTile(context, image, box) {
  context.imageSmoothingEnabled = !(image instanceof HTMLCanvasElement)
  context.drawImage(image, box.x, box.y, box.width, box.height)
}

/** Black as a tile, with an opacity for marked cells and another for the rest. */
function shade(marks, rows, columns, marked, others) {
  const pixels = new Uint8ClampedArray(4 * rows * columns)
  marks.forEach((mark, i) => (pixels[4 * i + 3] = 255 * (mark ? marked : others)))
  return canvasOf(new ImageData(pixels, columns, rows))
}

/** Darkens the cells of a box that are not marked. */
export function dimOthers(context, marks, rows, columns, box) {
  drawTile(context, shade(marks, rows, columns, 0, DIM), box)
}

/** The marked cells of a tile, stretched over a box. */
export function drawMarked(context, tile, marks, rows, columns, box) {
  const cut = shade(marks, rows, columns, 1, 0)
  const own = cut.getContext("2d")
  own.globalCompositeOperation = "source-in"
  own.drawImage(tile, 0, 0)
  drawTile(context, cut, box)
}

/** Fine lines between the cells of a box, where these are not too small. */
export function drawEdges(context, rows, columns, box) {
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

/** The borders of the marked region as a path in units of cells. */
export function borderOf(marks, rows, columns) {
  const path = new Path2D()
  const at = (row, column) =>
    row >= 0 && row < rows && column >= 0 && column < columns && marks[row * columns + column]
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      if (!at(row, column)) continue
      const line = (x, y, toX, toY) => (path.moveTo(x, y), path.lineTo(toX, toY))
      if (!at(row - 1, column)) line(column, row, column + 1, row)
      if (!at(row + 1, column)) line(column, row + 1, column + 1, row + 1)
      if (!at(row, column - 1)) line(column, row, column, row + 1)
      if (!at(row, column + 1)) line(column + 1, row, column + 1, row + 1)
    }
  return path
}

/** Draws a border of `borderOf` in a box: light on dark, so that it shows on every colour. */
export function drawBorder(context, path, columns, box, { dashed = false, width = 2 } = {}) {
  const scale = box.width / columns
  context.save()
  context.beginPath()
  context.rect(box.x, box.y, box.width, box.height)
  context.clip()
  context.translate(box.x, box.y)
  context.scale(scale, scale)
  context.lineCap = "square"
  for (const [colour, pixels] of [["#000", 2 * width], ["#fff", width]]) {
    context.strokeStyle = colour
    context.lineWidth = pixels / scale
    context.setLineDash(dashed && colour === "#fff" ? [0.5, 0.5] : [])
    context.stroke(path)
  }
  context.restore()
}

/** A frame around a box, in the colour of what is chosen. */
export function drawFrame(context, box, colour, width = 3) {
  context.strokeStyle = colour
  context.lineWidth = width
  const inset = width / 2
  context.strokeRect(box.x + inset, box.y + inset, box.width - width, box.height - width)
}

/** A number or a word in the corner of a box, on a dark ground. */
export function drawLabel(context, label, box) {
  const size = Math.max(9, Math.min(14, box.height / 6))
  context.font = `${size}px sans-serif`
  context.textBaseline = "top"
  const width = context.measureText(label).width + 6
  context.fillStyle = "#000a"
  context.fillRect(box.x, box.y, width, size + 4)
  context.fillStyle = "#fff"
  context.fillText(label, box.x + 3, box.y + 2)
}

/** A whole batch with its numbers and locks, on a sheet `width` wide; returns its height. */
export function drawSheet(context, grid, width, most) {
  const { rows, columns, count } = grid
  const sheet = sheetOf(count, rows, columns, width, most)
  const border = borderOf(grid.locked, rows, columns)
  sheet.boxes.forEach((box, i) => {
    drawTile(context, grid.tiles[i], box)
    drawBorder(context, border, columns, box, { width: 1 })
    if (count > 1) drawLabel(context, i, box)
  })
  return sheet.height
}

/** Gives a canvas the size of its element, in pixels of the screen; returns its cleared context. */
export function contextOf(canvas, width, height) {
  const ratio = Math.max(2, Math.min(4, window.devicePixelRatio || 1))
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)]
  if (canvas.width !== across || canvas.height !== down)
    Object.assign(canvas, { width: across, height: down })
  const context = canvas.getContext("2d")
  context.setTransform(ratio, 0, 0, ratio, 0, 0)
  context.clearRect(0, 0, width, height)
  return context
}
