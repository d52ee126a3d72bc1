/**
 * Put a page together that any static server can serve:
 *
 *     node web/build.js FOLDER SITE [--rows rows.jsonl]
 *
 * SITE gets the page, its scripts in two files, ONNX Runtime's module from the npm package, and the shipped folder.
 */

import { copyFile, cp, mkdir } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import { build } from "esbuild";

const WEB = fileURLToPath(new URL(".", import.meta.url));
const PAGE = ["index.html", "style.css", "icon.svg", "offline.js"];
const RUNTIME = ["ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"];

const { positionals, values } = parseArgs({ allowPositionals: true, options: { rows: { type: "string" } } });
const [folder, site] = positionals;
if (positionals.length !== 2) {
  console.error("usage: node web/build.js FOLDER SITE [--rows rows.jsonl]");
  process.exit(1);
}

await mkdir(site);
await build({
  entryPoints: ["page.js", "worker.js"].map((name) => join(WEB, name)),
  outdir: site,
  bundle: true,
  format: "esm",
  target: "es2022",
  minify: true,
  sourcemap: true,
  legalComments: "linked",
  // ONNX Runtime's module stays a file of its own: its threads load it as well.
  conditions: ["onnxruntime-web-use-extern-wasm"],
});
for (const name of PAGE) await copyFile(join(WEB, name), join(site, name));
for (const name of RUNTIME) {
  await copyFile(fileURLToPath(import.meta.resolve(`onnxruntime-web/${name}`)), join(site, name));
}
// The name is part of the addresses that a page kept for its next visit.
await cp(folder, join(site, "target"), { recursive: true });
if (values.rows) await copyFile(values.rows, join(site, "rows.jsonl"));
