// What the editors of cells say, in the page's language: words of all of them, then those of each.
import { app } from "../../scripts/app.js"

const COMMON = {
  en: {
    run: "Run only what leads to this node",
    rectangle: "Drag rectangles",
    brush: "Drag with a brush",
    undo: "Undo",
    size: (rows, columns) => `${rows} rows × ${columns} columns`,
    by: (input) => `by ${input}`,
    cell: (row, column) => `row ${row}, column ${column}`,
    more: (count, total) => `the first ${count} of ${total} are shown`,
    wrong: (text, rows, columns) => `cells “${text}” does not fit ${rows} rows × ${columns} columns`,
    keep: "Keep them here",
    drop: "Drop them",
  },
  zh: {
    run: "只运行到这个节点",
    rectangle: "拖出矩形",
    brush: "用画笔拖动",
    undo: "撤销",
    size: (rows, columns) => `${rows} 行 × ${columns} 列`,
    by: (input) => `由 ${input}`,
    cell: (row, column) => `第 ${row} 行，第 ${column} 列`,
    more: (count, total) => `显示前 ${count} 个，共 ${total} 个`,
    wrong: (text, rows, columns) => `cells “${text}” 不适合 ${rows} 行 × ${columns} 列`,
    keep: "在此保留",
    drop: "放弃",
  },
}
const OWN = {
  GLMImageLockLayout: {
    en: {
      empty: "Press ▶ or run: the layouts appear here. Click one to take it, drag over it to lock cells.",
      mark: "Lock cells",
      unmark: "Unlock cells (or hold Shift)",
      invert: "Exchange locked and unlocked (I)",
      clear: "Name no cells: lock counts again (Backspace)",
      taken: (index, total) => `layout ${index} of ${total}`,
      all: (total) => `all ${total} layouts`,
      count: (count, of) => `${count} of ${of} cells locked`,
      by: (lock) => `by lock: ${lock}`,
      outside: (index, total) => `batch_index ${index}: there are ${total} layouts`,
      least: "One cell stays locked: with none named lock counts, which another node sets.",
      stale: "These cells were chosen for other layouts.",
      label: "Layouts. Arrow keys move, Space locks, Shift and arrows choose, Page keys change layout.",
    },
    zh: {
      empty: "按 ▶ 或运行，布局就显示在这里。单击选取，在上面拖动以锁定格子。",
      mark: "锁定格子",
      unmark: "解除格子（或按住 Shift）",
      invert: "锁定与未锁定互换（I）",
      clear: "不指定格子：lock 重新生效（Backspace）",
      taken: (index, total) => `布局 ${index}，共 ${total} 个`,
      all: (total) => `全部 ${total} 个布局`,
      count: (count, of) => `锁定 ${count} / ${of} 格`,
      by: (lock) => `由 lock：${lock}`,
      outside: (index, total) => `batch_index ${index}：共有 ${total} 个布局`,
      least: "至少锁定一格：不指定格子时由 lock 决定，而 lock 由其他节点给出。",
      stale: "这些格子是为其他布局选定的。",
      label: "布局。方向键移动，空格锁定，Shift 加方向键选择，Page 键切换布局。",
    },
  },
  GLMImageSampleTokens: {
    en: {
      empty: "Run: the tokens to redraw appear here. Drag over what shall be drawn anew.",
      mark: "Redraw cells",
      unmark: "Keep cells (or hold Shift)",
      invert: "Exchange what is redrawn and what is kept (I)",
      clear: "Name no cells: the mask counts again (Backspace)",
      taken: (index, total) => `tokens ${index} of ${total}`,
      count: (count, of) => `${count} of ${of} cells drawn anew`,
      least: "One cell stays: with none named the mask counts (✕).",
      stale: "These cells were chosen for other tokens.",
      label: "Tokens. Arrow keys move, Space redraws, Shift and arrows choose, Page keys change the picture.",
    },
    zh: {
      empty: "运行后，要重画的 token 显示在这里。在上面拖动以选择重画的部分。",
      mark: "重画格子",
      unmark: "保留格子（或按住 Shift）",
      invert: "重画与保留互换（I）",
      clear: "不指定格子：遮罩重新生效（Backspace）",
      taken: (index, total) => `token ${index}，共 ${total} 个`,
      count: (count, of) => `重画 ${count} / ${of} 格`,
      least: "至少保留一格：不指定格子时遮罩生效（✕）。",
      stale: "这些格子是为其他 token 选定的。",
      label: "token。方向键移动，空格重画，Shift 加方向键选择，Page 键切换图像。",
    },
  },
  GLMImageComposeLayouts: {
    en: {
      empty: "Run: source and base appear here. Drag over the source for what to take, then move it on the base.",
      mark: "Take cells",
      unmark: "Leave cells (or hold Shift)",
      invert: "Exchange what is taken and what is left (I)",
      clear: "Name no cells: the mask counts again, or all (Backspace)",
      source: "source",
      base: "base",
      at: (row, column) => `source at row ${row}, column ${column}`,
      count: (count, of) => `${count} of ${of} cells taken`,
      least: "One cell stays: with none named the mask counts, or all (✕).",
      stale: "These cells were chosen for another source.",
      label: "Source and base. Arrow keys move the cursor, Space takes, Shift and arrows choose, Alt and arrows move the source.",
    },
    zh: {
      empty: "运行后，源和底显示在这里。在源上拖动以选取，再在底上移动它。",
      mark: "选取格子",
      unmark: "不取格子（或按住 Shift）",
      invert: "选取与不取互换（I）",
      clear: "不指定格子：遮罩重新生效，或取全部（Backspace）",
      source: "源",
      base: "底",
      at: (row, column) => `源在第 ${row} 行，第 ${column} 列`,
      count: (count, of) => `选取 ${count} / ${of} 格`,
      least: "至少保留一格：不指定格子时遮罩生效，或取全部（✕）。",
      stale: "这些格子是为另一个源选定的。",
      label: "源和底。方向键移动光标，空格选取，Shift 加方向键选择，Alt 加方向键移动源。",
    },
  },
}

/** The words of the editor on nodes of a type. */
export function editorTexts(type) {
  const locale = app.extensionManager.setting.get("Comfy.Locale") ?? "en"
  const language = locale.startsWith("zh") ? "zh" : "en"
  return { ...COMMON[language], ...OWN[type][language] }
}
