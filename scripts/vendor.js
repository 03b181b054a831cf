/**
 * Bundles the chat page's libraries (page-libraries.js) into static/vendor, with their licences.
 *
 * `--check` writes nothing and fails where what is there is not what the locked packages give.
 */

import { readFile, readdir, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";

import { build } from "esbuild";

const ROOT = new URL("../", import.meta.url);
const FOLDER = new URL("d2f_stream/server/static/vendor/", ROOT);

const bundle = await build({
  entryPoints: [fileURLToPath(new URL("scripts/page-libraries.js", ROOT))],
  absWorkingDir: fileURLToPath(ROOT),
  bundle: true,
  charset: "utf8",
  format: "esm",
  legalComments: "none", // LICENSES.txt has them whole
  metafile: true,
  minify: true,
  target: "es2022",
  write: false,
});

const files = Object.keys(bundle.metafile.inputs);
const names = new Set(files.map((file) => file.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1]));
names.delete(undefined);
const licences = await Promise.all([...names].sort().map(licenceOf));
const made = { "libraries.js": bundle.outputFiles[0].text, "LICENSES.txt": licences.join("\n") };

for (const [name, text] of Object.entries(made)) {
  const place = new URL(name, FOLDER);
  if (!process.argv.includes("--check")) await writeFile(place, text);
  else if ((await readFile(place, "utf8")) !== text) {
    console.error(`${fileURLToPath(place)} is not what the packages give; run: npm run vendor`);
    process.exitCode = 1;
  }
}

async function licenceOf(name) {
  const folder = new URL(`node_modules/${name}/`, ROOT);
  const { version, license } = JSON.parse(await readFile(new URL("package.json", folder), "utf8"));
  const found = (await readdir(folder)).find((file) => /^licen[sc]e/i.test(file));
  const text = found ? await readFile(new URL(found, folder), "utf8") : "(names its licence only)\n";
  return `==== ${name} ${version} (${license})\n\n${text.replaceAll("\r", "").trim()}\n`;
}
