/* The start: the key, what is served, and all parts. */
async function start() {
  find("problem").hidden = true;
  try {
    const dial = await (await ask("/dial")).json();
    digits = dial.digits;
    Object.assign(served, { base: dial.base, vectors: dial.vectors, outOfRange: dial.out_of_range, server: dial.server });
  } catch (error) {
    find("problem").querySelector("span").textContent = inWords(error);
    find("problem").hidden = false;
    return;
  }
  find("base").replaceChildren("Base model: ", make("span", { class: "foreign", dir: "auto" }, served.base));
  for (const id of ["dials", "settings", "both"]) find(id).hidden = false;
  find("next").hidden = false;
  showDials();
  startChat();
  startFan();
  startCode();
  showSettings();
  for (const id of ["system", "temperature", "longest", "seed"]) find(id).addEventListener("input", showSettings);
  showChat();
}

find("problem").querySelector("button").onclick = start;
takeKey();
start();
