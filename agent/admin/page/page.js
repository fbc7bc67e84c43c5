// Shows the page anew every two seconds, as long as it is visible.
const again = async () => {
  if (!document.hidden) {
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      document.querySelector("main").replaceWith(fresh.querySelector("main"));
      document.body.classList.remove("gone");
    } catch {
      document.body.classList.add("gone");
    }
  }
  setTimeout(again, 2000);
};
setTimeout(again, 2000);
