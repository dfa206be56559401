// What the editor of cells says, in the page's language.
import { app } from "../../scripts/app.js"

const TEXTS = {
  en: {
    empty: "Press ▶ or run: the layouts appear here. Click one to take it, drag over it to lock cells.",
    run: "Run only what leads to this node",
    rectangle: "Drag rectangles",
    brush: "Drag with a brush",
    mark: "Lock cells",
    unmark: "Unlock cells (or hold Shift)",
    invert: "Exchange locked and unlocked (I)",
    clear: "Name no cells: lock counts again (Backspace)",
    undo: "Undo",
    taken: (index, total) => `layout ${index} of ${total}`,
    all: (total) => `all ${total} layouts`,
    size: (rows, columns) => `${rows} rows × ${columns} columns`,
    count: (count, of) => `${count} of ${of} cells locked`,
    by: (lock) => `by lock: ${lock}`,
    cell: (row, column) => `row ${row}, column ${column}`,
    more: (count, total) => `the first ${count} of ${total} are shown`,
    wrong: (text, rows, columns) => `cells “${text}” does not fit ${rows} rows × ${columns} columns`,
    outside: (index, total) => `batch_index ${index}: there are ${total} layouts`,
    stale: "These cells were chosen for other layouts.",
    keep: "Keep them here",
    drop: "Drop them",
    label: "Layouts. Arrow keys move, Space locks, Shift and arrows choose, Page keys change layout.",
  },
  zh: {
    empty: "按 ▶ 或运行，布局就显示在这里。单击选取，在上面拖动以锁定格子。",
    run: "只运行到这个节点",
    rectangle: "拖出矩形",
    brush: "用画笔拖动",
    mark: "锁定格子",
    unmark: "解除格子（或按住 Shift）",
    invert: "锁定与未锁定互换（I）",
    clear: "不指定格子：lock 重新生效（Backspace）",
    undo: "撤销",
    taken: (index, total) => `布局 ${index}，共 ${total} 个`,
    all: (total) => `全部 ${total} 个布局`,
    size: (rows, columns) => `${rows} 行 × ${columns} 列`,
    count: (count, of) => `锁定 ${count} / ${of} 格`,
    by: (lock) => `由 lock：${lock}`,
    cell: (row, column) => `第 ${row} 行，第 ${column} 列`,
    more: (count, total) => `显示前 ${count} 个，共 ${total} 个`,
    wrong: (text, rows, columns) => `cells “${text}” 不适合 ${rows} 行 × ${columns} 列`,
    outside: (index, total) => `batch_index ${index}：共有 ${total} 个布局`,
    stale: "这些格子是为其他布局选定的。",
    keep: "在此保留",
    drop: "放弃",
    label: "布局。方向键移动，空格锁定，Shift 加方向键选择，Page 键切换布局。",
  },
}

export function editorTexts() {
  const locale = app.extensionManager.setting.get("Comfy.Locale") ?? "en"
  return TEXTS[locale.startsWith("zh") ? "zh" : "en"]
}
