// The editor of cells on a node: takes one grid of a batch, and marks cells of it.
// It reads and writes a node's inputs through `inputs` and keeps nothing of them itself.
import { countOf, formatCells, inverted, parseCells, withLine, withRectangle } from "./cells.js"
import { buildParts, press } from "./editor_parts.js"
import { cellAt, drawEditor, isIn, placesOf, renderSheet, tileAt } from "./editor_view.js"
import { contextOf } from "./grids.js"

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }
const MOST_UNDO = 100

export class CellEditor {
  /**
   * `inputs`: {read, pick, write, keep, run}; `keep(grid)` says that the cells are meant for this
   * grid, `run` runs what leads to the node.
   * `read(grid)` returns {taken, cells, shown, given, lock, stale, fixed}: the index taken, or -1
   * for all; the text of the cells; the marks that count while it is empty, and those to begin
   * with; the name of what sets them; whether the cells are of other grids; whether the inputs are
   * linked, and only shown.
   */
  constructor(inputs, texts) {
    this.inputs = inputs
    this.texts = texts
    this.grid = null
    this.pictures = []
    this.tool = "rectangle"
    this.value = 1 // what the tool sets
    this.undoable = []
    this.gesture = null // {value, from, last, marks} while a pointer is down
    this.cursor = null // of the keys
    this.anchor = null
    this.hovered = null
    this.parts = buildParts(texts, {
      run: () => this.inputs.run(),
      rectangle: () => this.choose("rectangle", this.value),
      brush: () => this.choose("brush", this.value),
      mark: () => this.choose(this.tool, 1),
      unmark: () => this.choose(this.tool, 0),
      invert: () => this.change((marks) => inverted(marks), 0),
      clear: () => this.write(""),
      undo: () => this.undo(),
      keep: () => (this.inputs.keep(this.grid), this.redraw()),
      drop: () => this.write(""),
    })
    this.element = this.parts.root
    this.listen()
    this.choose("rectangle", 1)
  }

  /** Shows a grid of `decodeGrid`, and pictures in place of its tiles as they are loaded. */
  show(grid, urls = []) {
    const same = this.grid?.hashes.join() === grid.hashes.join()
    if (!same) Object.assign(this, { cursor: null, anchor: null, gesture: null })
    this.grid = grid
    this.sheet = null
    this.pictures = same ? this.pictures.slice(0, urls.length) : []
    urls.forEach((url, i) => {
      const picture = new Image()
      picture.onload = () => {
        if (this.grid !== grid) return
        this.pictures[i] = picture
        this.sheet = null
        this.redraw()
      }
      picture.src = url
    })
    this.redraw()
  }

  choose(tool, value) {
    this.tool = tool
    this.value = value
    const { buttons } = this.parts
    for (const name of ["rectangle", "brush"]) press(buttons[name], name === tool)
    press(buttons.mark, value === 1)
    press(buttons.unmark, value === 0)
  }

  /** The marks as they count now; `value` says for which change they are the start. */
  marks(now, value = 0) {
    const { rows, columns } = this.grid
    if (now.cells.trim()) return parseCells(now.cells, rows, columns)
    return value ? now.given : now.shown
  }

  change(changed, value) {
    const now = this.inputs.read(this.grid)
    const marks = now.fixed ? null : (this.marks(now, value) ?? new Uint8Array(this.size))
    if (marks) this.write(formatCells(changed(marks), this.grid.rows, this.grid.columns))
  }

  get size() {
    return this.grid.rows * this.grid.columns
  }

  write(cells) {
    const now = this.inputs.read(this.grid)
    if (now.fixed || now.cells === cells) return this.redraw()
    this.remember(now)
    this.inputs.write(cells)
    this.redraw()
  }

  pick(index) {
    const now = this.inputs.read(this.grid)
    if (now.taken === index || index < 0 || index >= this.grid.count) return
    this.remember(now)
    this.inputs.pick(index)
    this.redraw()
  }

  remember({ taken, cells }) {
    this.undoable.push({ taken, cells })
    if (this.undoable.length > MOST_UNDO) this.undoable.shift()
  }

  undo() {
    const before = this.undoable.pop()
    if (!before) return
    this.inputs.pick(before.taken)
    this.inputs.write(before.cells)
    this.redraw()
  }

  listen() {
    const { canvas, root } = this.parts
    canvas.addEventListener("pointerdown", (event) => this.press(event))
    canvas.addEventListener("pointermove", (event) => this.move(event))
    canvas.addEventListener("pointerup", () => this.release())
    canvas.addEventListener("pointercancel", () => this.cancel())
    canvas.addEventListener("pointerleave", () => this.hover(null))
    canvas.addEventListener("pointerenter", () => this.redraw())
    canvas.addEventListener("keydown", (event) => this.key(event))
    canvas.addEventListener("blur", () => this.leaveKeys())
    new ResizeObserver(() => this.redraw()).observe(canvas)
    root.addEventListener("keydown", (event) => {
      // The page would delete or move the node. Its own undo and Control+Enter go on to it.
      if (!event.ctrlKey && !event.metaKey) event.stopPropagation()
    })
  }

  /** A point in the canvas' own pixels, whatever the page scales it by. */
  point(event) {
    const { canvas } = this.parts
    const seen = canvas.getBoundingClientRect()
    return [
      ((event.clientX - seen.left) * canvas.clientWidth) / seen.width,
      ((event.clientY - seen.top) * canvas.clientHeight) / seen.height,
    ]
  }

  press(event) {
    if (event.button !== 0 || !this.grid || !this.places) return
    this.parts.canvas.focus({ preventScroll: true })
    this.leaveKeys()
    const [x, y] = this.point(event)
    const tile = tileAt(this.places, x, y)
    if (tile >= 0) return this.pick(tile)
    const now = this.inputs.read(this.grid)
    if (now.fixed || !isIn(this.places.large, x, y)) return
    this.parts.canvas.setPointerCapture(event.pointerId)
    const value = event.shiftKey ? 0 : this.value
    const marks = this.marks(now, value) ?? new Uint8Array(this.size)
    const cell = cellAt(this.places, this.grid, x, y)
    this.gesture = { value, from: cell, last: cell, before: marks, marks }
    this.drag(cell)
  }

  move(event) {
    if (!this.grid || !this.places) return
    const [x, y] = this.point(event)
    const inside = isIn(this.places.large, x, y)
    const cell = cellAt(this.places, this.grid, x, y)
    if (this.gesture) this.drag(cell)
    else this.hover(inside ? cell : null)
  }

  drag(cell) {
    const { value, from, last, before, marks } = this.gesture
    const { columns } = this.grid
    this.gesture.marks =
      this.tool === "brush"
        ? withLine(marks, columns, last, cell, value)
        : withRectangle(before, columns, from, cell, value)
    this.gesture.last = cell
    this.hover(cell)
  }

  hover(cell) {
    if (String(cell) === String(this.hovered)) return
    this.hovered = cell
    this.redraw()
  }

  release() {
    if (!this.gesture) return
    const { marks } = this.gesture
    this.gesture = null
    this.write(formatCells(marks, this.grid.rows, this.grid.columns))
  }

  cancel() {
    this.gesture = null
    this.redraw()
  }

  key(event) {
    const act = this.grid && !event.ctrlKey && !event.metaKey && this.actOf(event)
    if (!act) return
    event.preventDefault()
    act()
    this.redraw()
  }

  actOf(event) {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key
    if (STEPS[key]) return () => this.step(STEPS[key], event.shiftKey)
    const { taken } = this.inputs.read(this.grid)
    return {
      " ": () => this.fill(event.shiftKey ? 0 : this.value),
      Enter: () => this.fill(event.shiftKey ? 0 : this.value),
      Delete: () => this.fill(0),
      Backspace: () => this.write(""),
      Escape: () => this.cancel(),
      PageUp: () => this.pick(taken - 1),
      PageDown: () => this.pick(taken + 1),
      i: () => this.change((marks) => inverted(marks), 0),
    }[key]
  }

  step([down, right], extend) {
    const [row, column] = this.cursor ?? [0, 0]
    const { rows, columns } = this.grid
    const next = [
      Math.max(0, Math.min(rows - 1, row + (this.cursor ? down : 0))),
      Math.max(0, Math.min(columns - 1, column + (this.cursor ? right : 0))),
    ]
    this.anchor = extend ? (this.anchor ?? this.cursor ?? next) : null
    this.cursor = next
    this.hovered = next
  }

  leaveKeys() {
    this.cursor = this.anchor = null
    this.redraw()
  }

  fill(value) {
    if (!this.cursor) return
    const [from, to] = [this.anchor ?? this.cursor, this.cursor]
    this.change((marks) => withRectangle(marks, this.grid.columns, from, to, value), value)
  }

  redraw() {
    this.pending ??= requestAnimationFrame(() => {
      this.pending = null
      this.draw()
    })
  }

  draw() {
    const { canvas, notice, readout, buttons } = this.parts
    const { run, ...others } = buttons
    for (const made of Object.values(others)) made.style.display = this.grid ? "" : "none"
    canvas.parentElement.style.display = this.grid ? "" : "none"
    if (!this.grid) {
      readout.textContent = this.texts.empty
      return
    }
    const now = this.inputs.read(this.grid)
    const marks = this.gesture?.marks ?? this.marks(now) ?? new Uint8Array(this.size)
    notice.style.display = now.stale ? "flex" : "none"
    for (const made of Object.values(others)) made.disabled = now.fixed
    buttons.invert.disabled ||= !now.cells.trim()
    buttons.undo.disabled = !this.undoable.length
    readout.textContent = this.said(now, marks)
    this.paint(canvas, now, marks)
  }

  paint(canvas, now, marks) {
    const [width, height] = [canvas.clientWidth, canvas.clientHeight]
    if (!width || !height) return
    const context = contextOf(canvas, width, height)
    const ratio = canvas.width / width
    if (!this.sheet || this.sheetFor !== `${width} ${height} ${ratio}`) {
      this.places = placesOf(this.grid, width, height)
      this.sheetFor = `${width} ${height} ${ratio}`
      this.sheet = this.grid.count > 1 ? null : undefined
      if (this.sheet === null)
        this.sheet = renderSheet(this.grid, this.pictures, this.places, ratio, width)
    }
    drawEditor(context, this.grid, this.pictures, this.places, this.sheet, {
      taken: now.taken,
      marks: this.anchor ? this.chosen(marks) : marks,
      bright: countOf(marks) ? marks : null,
      cursor: this.cursor,
      stale: now.stale,
      accent: getComputedStyle(canvas).getPropertyValue("--p-primary-color") || "#3b82f6",
    })
  }

  /** The rectangle that keys choose, outlined before it is filled. */
  chosen(marks) {
    return withRectangle(marks, this.grid.columns, this.anchor, this.cursor, 1)
  }

  said(now, marks) {
    const { texts, grid } = this
    const { rows, columns, count, total } = grid
    const { taken, cells } = now
    if (taken >= total) return texts.outside(taken, total)
    if (cells.trim() && !parseCells(cells, rows, columns)) return texts.wrong(cells, rows, columns)
    const parts = [
      taken < 0 ? texts.all(total) : texts.taken(taken, total),
      texts.size(rows, columns),
      texts.count(countOf(marks), this.size),
    ]
    if (!cells.trim() && !this.gesture && now.lock) parts.push(texts.by(now.lock))
    if (count < total) parts.push(texts.more(count, total))
    if (this.hovered) parts.push(texts.cell(...this.hovered))
    return parts.join(" · ")
  }
}
