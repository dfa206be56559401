// The editor of cells on a node: a canvas with panes, their gestures and keys, buttons and undo.
// It keeps nothing of the node's inputs: it reads them before it draws, and writes them alone.
import { countOf, formatCells, inverted, parseCells } from "./cells.js"
import { buildParts, press } from "./editor_parts.js"
import { placesOf } from "./editor_places.js"
import { contextOf } from "./grids.js"

const MOST_UNDO = 100

/**
 * A pane is a part of the canvas: `isAt(state, x, y)`; `press(state, x, y, shift)`, which returns a
 * function from where the pointer goes to changes of inputs; `key(state, event)`, which returns
 * what the key does, if anything, and that may return changes; `draw(context, state)`. Changes are
 * null where no input could say them.
 */
export class CellEditor {
  /**
   * `kind` is what differs from node to node (`editor_widget.js`), `inputs` are the node's
   * (`node_inputs.js`), and `run` runs what leads to the node.
   */
  constructor(kind, inputs, texts, run) {
    Object.assign(this, { kind, inputs, texts })
    this.panes = kind.panes(texts)
    this.grid = null
    this.pictures = []
    this.places = null // since the last drawing
    this.tool = "rectangle"
    this.value = 1 // what the tool sets
    this.undoable = []
    this.drag = null // {pointer, at, changes} while a pointer is down
    this.stale = false // whether the cells drawn last were chosen on another grid
    this.refused = false // whether hands asked last for what no input could say
    this.parts = buildParts(texts, {
      run,
      rectangle: () => this.choose("rectangle", this.value),
      brush: () => this.choose("brush", this.value),
      mark: () => this.choose(this.tool, 1),
      unmark: () => this.choose(this.tool, 0),
      invert: () => this.write(this.tried(this.others())),
      clear: () => this.write({ cells: "" }),
      undo: () => this.undo(),
      keep: () => this.keep(),
      drop: () => this.write({ cells: "" }),
    })
    this.parts.buttons.run.style.display = kind.runs ? "" : "none"
    this.element = this.parts.root
    this.listen()
    this.choose("rectangle", 1)
  }

  /** Shows a grid of `decodeEditable`, and pictures in place of its tiles as they are loaded. */
  show(grid, urls = []) {
    const same = this.grid?.hashes.join() === grid.hashes.join()
    if (!same) {
      this.drag = null
      this.leaveKeys()
    }
    this.grid = grid
    this.pictures = same ? this.pictures.slice(0, urls.length) : []
    urls.forEach((url, i) => {
      const picture = new Image()
      picture.onload = () => {
        if (this.grid !== grid) return
        this.pictures[i] = picture
        this.redraw()
      }
      picture.src = url
    })
    this.inputs.adopt(this.state().meant)
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

  /**
   * All that is drawn and changed: what `kind.read` says of the node's inputs, with the changes of
   * the drag under way, and the marks that they make. `start(value)` are the marks with which a
   * change begins that sets cells to a value; `naming(marks)` are the changes that name cells.
   */
  state() {
    const { grid, kind } = this
    const values = { ...this.inputs.values(), ...this.drag?.changes }
    const now = kind.read(values, grid)
    const fixed = values.cells === undefined // another node names them
    const cells = values.cells ?? grid.markedText
    const read = cells.trim() ? parseCells(cells, grid.rows, grid.columns) : now.shown
    const none = new Uint8Array(grid.rows * grid.columns)
    const marks = read ?? none
    return {
      ...now,
      grid,
      texts: this.texts,
      pictures: this.pictures,
      places: this.places,
      tool: this.tool,
      value: this.value,
      fixed,
      cells,
      marks,
      fits: !cells.trim() || Boolean(read),
      kept: countOf(marks) ? kind.kept(marks) : null,
      stale: !fixed && !this.drag && this.inputs.isStale(now.meant),
      start: (set) => (cells.trim() || !set ? marks : (now.start ?? none)),
      naming: (chosen) =>
        fixed || countOf(chosen)
          ? { cells: formatCells(chosen, grid.rows, grid.columns) }
          : now.nothing,
      pick: kind.pick,
    }
  }

  /** Marked and unmarked cells exchanged, of cells that are named. */
  others() {
    const { cells, marks, naming } = this.state()
    return cells.trim() ? naming(inverted(marks)) : {}
  }

  /** The changes that hands ask for, and can have. */
  tried(changes) {
    this.refused = changes === null
    return this.inputs.free(changes ?? {})
  }

  write(changes) {
    const before = this.inputs.valuesOf(Object.keys(changes))
    if ("cells" in changes) this.stale = this.refused = false
    if (this.inputs.write(changes)) this.undoable.push(before)
    if (this.undoable.length > MOST_UNDO) this.undoable.shift()
    this.redraw()
  }

  undo() {
    this.stale = this.refused = false
    this.inputs.write(this.undoable.pop() ?? {})
    this.redraw()
  }

  /** After an input was changed by whomever: cells that fitted go with what is taken now. */
  changed() {
    if (!this.grid) return
    if (!this.stale) this.inputs.keep(this.state().meant)
    this.redraw()
  }

  keep() {
    this.inputs.keep(this.state().meant)
    this.redraw()
  }

  listen() {
    const { canvas, root } = this.parts
    canvas.addEventListener("pointerdown", (event) => this.pointerDown(event))
    canvas.addEventListener("pointermove", (event) => this.pointerMove(event))
    canvas.addEventListener("pointerup", (event) => this.pointerUp(event))
    canvas.addEventListener("pointercancel", () => this.cancel())
    canvas.addEventListener("pointerleave", () => this.hover())
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

  pointerDown(event) {
    if (!event.isPrimary) return this.cancel() // a second finger: the first meant no gesture
    if (event.button !== 0 || !this.places) return
    const { canvas } = this.parts
    canvas.focus({ preventScroll: true })
    this.leaveKeys()
    const state = this.state()
    const [x, y] = this.point(event)
    const at = this.panes
      .find((pane) => pane.isAt(state, x, y))
      ?.press(state, x, y, event.shiftKey)
    if (!at) return
    canvas.setPointerCapture(event.pointerId)
    this.drag = { pointer: event.pointerId, at, changes: {} }
    this.dragTo(x, y)
  }

  pointerMove(event) {
    if (!this.places) return
    const [x, y] = this.point(event)
    if (this.drag?.pointer === event.pointerId) this.dragTo(x, y)
    else if (!this.drag) this.hover(x, y)
  }

  dragTo(x, y) {
    this.drag.changes = this.tried(this.drag.at(x, y))
    this.hover(x, y)
    this.redraw()
  }

  /** Tells panes where the pointer is; without a place, that it is nowhere. */
  hover(x = -1, y = -1) {
    if (!this.places) return
    const state = this.state()
    const before = String(this.hovered())
    for (const pane of this.panes) pane.hover?.(state, x, y)
    const pane = this.panes.find((one) => one.isAt(state, x, y))
    if (!this.drag) this.parts.canvas.style.cursor = pane?.pointer ?? ""
    if (String(this.hovered()) !== before) this.redraw()
  }

  hovered() {
    return this.panes.map((pane) => pane.hovered).find(Boolean)
  }

  pointerUp(event) {
    if (this.drag?.pointer !== event.pointerId) return
    const { changes } = this.drag
    this.drag = null
    this.write(changes)
  }

  cancel() {
    this.drag = null
    this.redraw()
  }

  key(event) {
    if (!this.places || event.ctrlKey || event.metaKey) return
    const state = this.state()
    const act =
      this.ownKey(event) ?? this.panes.map((pane) => pane.key(state, event)).find(Boolean)
    if (!act) return
    event.preventDefault()
    this.write(this.tried(act()))
  }

  ownKey({ key }) {
    return {
      Backspace: () => ({ cells: "" }),
      Escape: () => this.cancel(),
      i: () => this.others(),
      I: () => this.others(),
    }[key]
  }

  leaveKeys() {
    for (const pane of this.panes) pane.leave?.()
    this.redraw()
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
    const [width, height] = [canvas.clientWidth, canvas.clientHeight]
    this.places = width && height ? placesOf(this.grid, width, height) : null
    const state = this.state()
    this.stale = state.stale
    notice.style.display = state.stale ? "flex" : "none"
    for (const made of Object.values(others)) made.disabled = state.fixed
    buttons.invert.disabled ||= !state.cells.trim()
    buttons.undo.disabled = !this.undoable.length
    readout.textContent = this.said(state)
    if (!this.places) return
    const context = contextOf(canvas, width, height)
    const accent = getComputedStyle(canvas).getPropertyValue("--p-primary-color") || "#3b82f6"
    for (const pane of this.panes) pane.draw(context, { ...state, accent })
  }

  said(state) {
    const { texts, cells, marks, grid, by } = state
    const { rows, columns, count, total } = grid
    if (state.taken >= total) return texts.outside(state.taken, total)
    if (!state.fits) return texts.wrong(cells, rows, columns)
    if (this.refused) return texts.least // alone, as a longer text would shrink the canvas
    const parts = [
      ...this.kind.about(state),
      texts.size(rows, columns),
      texts.count(countOf(marks), marks.length),
    ]
    if (!cells.trim() && by) parts.push(texts.by(by))
    if (count < total) parts.push(texts.more(count, total))
    const hovered = this.hovered()
    if (hovered) parts.push(texts.cell(...hovered))
    return parts.join(" · ")
  }
}
