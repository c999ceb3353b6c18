//! Dialogues for pretraining the nano model, made on the fly: locate, list and name objects, read a close-up.
//!
//! It hides scenes and drawing; a dialogue is words and finished views of the model's own size, drawn directly at that
//! size. What must stay true: the same library, recipe, seed, step and index give the same dialogue; boxes in words are
//! in pixels of the view, inside it, multiples of `snap` and longer than `min_side`; a close-up that is to be read shows
//! one plate, whole; the question of the RL task is never asked.

use std::fmt::Write as _;
use std::path::Path;

use ::image::RgbImage;
use anyhow::{Context, Result, ensure};
use rand::Rng;
use rand::seq::{IndexedRandom, index};
use rand_chacha::ChaCha8Rng;

use super::draw::{Frame, draw_region};
use super::library::Library;
use super::recipe::{Phase, Recipe, words};
use super::world::{Scene, background, free_place, numbers, object, plate, plate_size};
use super::{Split, pick, stream};
use crate::geometry::{BBox, Budget, Size, smart_resize};

mod several;

use several::Answer;

const PURPOSE: u64 = 2;
const PLATE_RATIO: f64 = 1.35;
/// Labels of plates: with its number where that can be read, without where it cannot.
pub(crate) const DIGIT: &str = "digit:";
const PLATE: &str = "plate";
/// Digits of fewer pixels (8 less a margin for rounding) are not named, so that no label teaches the model to guess at what only a close-up shows.
const LEGIBLE: f64 = 7.5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    System,
    User,
    Assistant,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Text(String),
    /// Index into [`Dialogue::views`].
    View(usize),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub role: Role,
    pub parts: Vec<Part>,
}

/// A picture as the model sees it, with everything that is in it.
#[derive(Clone, Debug)]
pub struct ShownView {
    /// Both sides are multiples of the recipe's factor.
    pub rgb: RgbImage,
    /// Names of objects; for plates that are whole `digit:7`, or `plate` where the digits have fewer than 8 rows.
    /// Boxes in pixels of this view, clipped to it.
    pub objects: Vec<(String, BBox)>,
}

#[derive(Clone, Debug)]
pub struct Dialogue {
    pub messages: Vec<Message>,
    pub views: Vec<ShownView>,
    /// One of the names in [`Weights`](super::recipe::Weights).
    pub task: &'static str,
}

/// Makes dialogues by number.
#[derive(Clone, Debug)]
pub struct Pretrain {
    library: Library,
    recipe: Recipe,
    picture: Size,
    view: Size,
}

impl Pretrain {
    /// # Errors
    /// A recipe out of range, or bundled files missing or damaged.
    pub fn load(assets: &Path, split: Split, recipe: Recipe) -> Result<Pretrain> {
        // Views are 300 pixels wide and close-ups show a fifth of a picture: more than 1400 pixels is never seen.
        Pretrain::new(Library::load(assets, split, 1400)?, recipe)
    }

    /// # Errors
    /// A recipe out of range.
    pub fn new(library: Library, recipe: Recipe) -> Result<Pretrain> {
        recipe.validate().context("reading the pretraining recipe")?;
        let picture = Size::new(recipe.picture[0], recipe.picture[1]);
        let square = u64::from(recipe.factor) * u64::from(recipe.factor);
        let view = smart_resize(picture, Budget::new(4 * square, recipe.view_tokens * square, recipe.factor))?;
        Ok(Pretrain { library, recipe, picture, view })
    }

    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Every label that [`ShownView::objects`] can carry while plates have one digit: classes of a dense head.
    pub fn labels(&self) -> Vec<String> {
        let objects = self.library.classes.iter().map(|class| class.name.clone());
        objects.chain((0..10).map(|d| format!("{DIGIT}{d}"))).chain([PLATE.to_owned()]).collect()
    }

    /// Dialogue `index` of `seed`, as hard as the phase of `step` says. The index alone decides the chance: count it up over steps.
    ///
    /// # Errors
    /// None for a recipe that was accepted, unless a view cannot be sized.
    pub fn dialogue(&self, seed: u64, step: u64, index: u64) -> Result<Dialogue> {
        let phase = self.recipe.phase(step).context("the recipe has no phases")?;
        let mut rng = stream(seed, PURPOSE + 16 * self.library.split as u64, index);
        let w = phase.tasks;
        let tasks = w.named();
        let mut left = rng.random_range(0.0..1.0) * tasks.iter().map(|t| t.1).sum::<f64>();
        let mut task = tasks.iter().rev().find(|t| t.1 > 0.0).map_or("read", |t| t.0);
        for (name, weight) in tasks {
            if left < weight {
                task = name;
                break;
            }
            left -= weight;
        }
        let mut writer = Writer::new(&self.recipe.system);
        match task {
            "locate" => self.locate(&mut rng, phase, &mut writer)?,
            "list" => self.list(&mut rng, phase, &mut writer)?,
            "name" => self.name(&mut rng, phase, &mut writer)?,
            "two_turns" => self.two_turns(&mut rng, phase, &mut writer)?,
            "tell" => self.tell(&mut rng, phase, &mut writer)?,
            "find" => self.find(&mut rng, phase, Answer::Box, &mut writer)?,
            "which" => self.find(&mut rng, phase, Answer::Number, &mut writer)?,
            "say" => self.find(&mut rng, phase, Answer::Sentence, &mut writer)?,
            "point" => self.point(&mut rng, phase, &mut writer)?,
            "describe" => self.describe(&mut rng, phase, &mut writer)?,
            "name_in" => self.name_in(&mut rng, phase, &mut writer)?,
            "common" => self.common(&mut rng, phase, &mut writer)?,
            _ => self.read(&mut rng, phase, &mut writer)?,
        }
        Ok(Dialogue { messages: writer.messages, views: writer.views, task })
    }

    fn locate(&self, rng: &mut ChaCha8Rng, phase: &Phase, out: &mut Writer) -> Result<()> {
        let scene = self.any_scene(rng, phase);
        self.ask_where(rng, phase, &scene, out);
        Ok(())
    }

    /// A user turn with the whole scene and a question for some object's place, and the careless answer.
    fn ask_where(&self, rng: &mut ChaCha8Rng, phase: &Phase, scene: &Scene, out: &mut Writer) {
        let view = self.whole(scene);
        let Some((name, tight)) =
            view.objects.iter().filter(|(label, _)| is_object(label)).collect::<Vec<_>>().choose(rng).copied().cloned()
        else {
            return;
        };
        let wording = pick(rng, words::LOCATE).replace("{X}", &name);
        let answer = words::boxes(&[(self.careless(rng, phase, tight), &name)]);
        out.ask_view("", view, words::question(&wording, words::LOCATE_REQUEST));
        out.say(answer);
    }

    fn list(&self, rng: &mut ChaCha8Rng, phase: &Phase, out: &mut Writer) -> Result<()> {
        let scene = self.any_scene(rng, phase);
        let view = self.whole(&scene);
        let mut listed: Vec<(BBox, String)> =
            view.objects.iter().filter(|(label, _)| is_object(label)).map(|(l, b)| (*b, l.clone())).collect();
        // Left to right, so that there is one right order to learn.
        listed.sort_by(|a, b| a.0.center().0.total_cmp(&b.0.center().0));
        let boxes: Vec<([i64; 4], &str)> = listed.iter().map(|(b, label)| (self.snapped(*b), label.as_str())).collect();
        let answer = words::boxes(&boxes);
        out.ask_view("", view, words::question(pick(rng, words::LIST), words::LIST_REQUEST));
        out.say(answer);
        Ok(())
    }

    /// The names alone, left to right, as a sentence has them.
    fn tell(&self, rng: &mut ChaCha8Rng, phase: &Phase, out: &mut Writer) -> Result<()> {
        let view = self.whole(&self.any_scene(rng, phase));
        let answer = several::left_to_right(&view);
        out.ask_view("", view, words::question(pick(rng, words::TELL), "").trim_end().to_owned());
        out.say(format!("I see {answer}."));
        Ok(())
    }

    fn name(&self, rng: &mut ChaCha8Rng, phase: &Phase, out: &mut Writer) -> Result<()> {
        let scene = self.any_scene(rng, phase);
        let view = self.whole(&scene);
        let Some((name, tight)) =
            view.objects.iter().filter(|(label, _)| is_object(label)).collect::<Vec<_>>().choose(rng).copied().cloned()
        else {
            return Ok(());
        };
        let [x1, y1, x2, y2] = self.snapped(tight);
        let wording = pick(rng, words::NAME).replace("{BOX}", &format!("[{x1},{y1},{x2},{y2}]"));
        out.ask_view("", view, words::question(&wording, words::ANSWER_REQUEST));
        out.say(words::boxed(&name));
        Ok(())
    }

    fn read(&self, rng: &mut ChaCha8Rng, phase: &Phase, out: &mut Writer) -> Result<()> {
        let aspect = self.aspect();
        let mut scene = background(&self.library, rng, aspect, self.augment());
        // Any box the model could name: a tenth to half of the width, up to twice as long as wide either way.
        let width = between(rng, [0.11, 0.5]);
        let height = (width * between(rng, [-0.7, 0.7]).exp()).min(aspect * 0.95).min(0.6);
        let x = rng.random_range(0.0..=1.0 - width);
        let y = rng.random_range(0.0..=aspect - height);
        let region = BBox::new(x, y, x + width, y + height);
        let size = self.close_up(region)?;
        let digits = count(rng, phase.digits);
        let digit_height = self.digit_height(rng, phase, region, size, digits);
        let (w, h) = plate_size(digits, digit_height, PLATE_RATIO);
        // Small plates may lie anywhere in the region, whole.
        let corner = (
            rng.random_range(region.x1..=(region.x2 - w).max(region.x1)),
            rng.random_range(region.y1..=(region.y2 - h).max(region.y1)),
        );
        let text = numbers(rng, 1, digits).concat();
        let shown = plate(&self.library, rng, text.clone(), corner, digit_height, PLATE_RATIO, self.variation(phase));
        if rng.random_bool(0.6) {
            // Something stands above it, as large as things are beside their plates in a picture.
            let class = rng.random_range(0..self.library.classes.len());
            let longest = digit_height * between(rng, [5.0, 12.0]);
            let mut above = object(&self.library, rng, class, longest, self.augment());
            let gap = digit_height * between(rng, [0.2, 1.5]);
            let left = shown.bbox.center().0 - above.bbox.width() * between(rng, [0.2, 0.8]);
            let top = shown.bbox.y1 - gap - above.bbox.height();
            above.bbox = BBox::new(left, top, left + above.bbox.width(), top + above.bbox.height());
            scene.objects.push(above);
        }
        for _ in 0..rng.random_range(0..=2) {
            let class = rng.random_range(0..self.library.classes.len());
            let longest = between(rng, phase.object_size);
            let mut near = object(&self.library, rng, class, longest, self.augment());
            let (cx, cy) = (rng.random_range(region.x1..=region.x2), rng.random_range(region.y1..=region.y2));
            let (w, h) = (near.bbox.width() / 2.0, near.bbox.height() / 2.0);
            near.bbox = BBox::new(cx - w, cy - h, cx + w, cy + h);
            let free = near.bbox.intersection(&shown.bbox).is_none()
                && scene.objects.iter().all(|o| o.bbox.intersection(&near.bbox).is_none());
            if free {
                scene.objects.push(near);
            }
        }
        scene.loose.push(shown);
        let view = self.shown(&scene, region, size);
        out.ask_view("", view, words::question(pick(rng, words::READ), words::ANSWER_REQUEST));
        out.say(words::boxed(&text));
        Ok(())
    }

    fn two_turns(&self, rng: &mut ChaCha8Rng, phase: &Phase, out: &mut Writer) -> Result<()> {
        let digits = count(rng, phase.digits);
        let (plate_w, plate_h) = plate_size(digits, 1.0, PLATE_RATIO);
        // A box of the view that could be cropped, then digits that are as large in it as the phase wants.
        let snap = f64::from(self.recipe.snap);
        let (unit_x, unit_y) = (f64::from(self.view.width), f64::from(self.view.height) / self.aspect());
        let frame = Frame { region: BBox::new(0.0, 0.0, 1.0, self.aspect()), size: self.view };
        let mut sides = || {
            let width = (between(rng, [36.0, 0.5 * unit_x]) / snap).round() * snap;
            let height = (width * between(rng, [-0.6, 0.6]).exp()).clamp(36.0, f64::from(self.view.height) * 0.9);
            (width, (height / snap).round() * snap)
        };
        let (width, height) = sides();
        let region_size = BBox::new(0.0, 0.0, width / unit_x, height / unit_y);
        let size = self.close_up(region_size)?;
        // No larger than can be scattered over a scene.
        let digit_height = self.digit_height(rng, phase, region_size, size, digits).min(0.06);
        let mut scene = self.scene(rng, phase, digits, digit_height);
        let (w, h) = (plate_w * digit_height, plate_h * digit_height);
        if scene.loose.is_empty() {
            let corner = (rng.random_range(0.01..=0.99 - w), rng.random_range(0.01..=self.aspect() - 0.01 - h));
            let text = numbers(rng, 1, digits).concat();
            scene.loose.push(plate(&self.library, rng, text, corner, digit_height, PLATE_RATIO, self.variation(phase)));
        }
        let chosen = rng.random_range(0..scene.loose.len());
        let target = frame.pixels(scene.loose[chosen].bbox);
        let text = scene.loose[chosen].text.clone();
        // Some box of that size around the plate, inside the view.
        let place = |rng: &mut ChaCha8Rng, from: f64, to: f64, side: f64, end: f64| {
            let low = (to - side).max(0.0);
            let high = from.min(end - side).max(low);
            (rng.random_range(low..=high) / snap).floor() * snap
        };
        let x = place(rng, target.x1, target.x2, width, f64::from(self.view.width));
        let y = place(rng, target.y1, target.y2, height, f64::from(self.view.height));
        let end = |from: f64, side: f64, to: f64, edge: f64| (from + side).max((to / snap).ceil() * snap).min(edge);
        let box_in_view = BBox::new(
            x,
            y,
            end(x, width, target.x2, f64::from(self.view.width)),
            end(y, height, target.y2, f64::from(self.view.height)),
        );
        let region = frame.scene(box_in_view);
        // Exactly one plate: others that would be seen go away, from both views.
        let kept = scene.loose[chosen].clone();
        scene.loose.retain(|p| *p == kept || p.bbox.intersection(&region).is_none());

        self.ask_where(rng, phase, &scene, out);
        let closer = self.shown(&scene, region, self.close_up(region)?);
        out.ask_view(words::ENLARGED, closer, words::question(pick(rng, words::READ), words::ANSWER_REQUEST));
        out.say(words::boxed(&text));
        Ok(())
    }

    fn any_scene(&self, rng: &mut ChaCha8Rng, phase: &Phase) -> Scene {
        let digits = count(rng, phase.digits);
        let digit_height = between(rng, phase.digit_height);
        self.scene(rng, phase, digits, digit_height)
    }

    /// Objects and loose plates on a photograph; at least one object.
    fn scene(&self, rng: &mut ChaCha8Rng, phase: &Phase, digits: usize, digit_height: f64) -> Scene {
        let aspect = self.aspect();
        let mut scene = background(&self.library, rng, aspect, self.augment());
        let wanted = count(rng, phase.objects).min(self.library.classes.len());
        let mut taken: Vec<BBox> = Vec::new();
        for class in index::sample(rng, self.library.classes.len(), wanted) {
            let longest = between(rng, phase.object_size);
            let mut placed = object(&self.library, rng, class, longest, self.augment());
            let Some((x, y)) = free_place(rng, &taken, (placed.bbox.width(), placed.bbox.height()), aspect, 0.01)
            else {
                continue;
            };
            placed.bbox = BBox::new(x, y, x + placed.bbox.width(), y + placed.bbox.height());
            taken.push(placed.bbox);
            scene.objects.push(placed);
        }
        // Plates keep off the place below an object, where the RL task has them.
        for b in &mut taken {
            b.y2 += 0.05;
        }
        let wanted = count(rng, phase.plates);
        for text in numbers(rng, wanted.min(9), digits) {
            let size = plate_size(digits, digit_height, PLATE_RATIO);
            let Some(corner) = free_place(rng, &taken, size, aspect, 0.01) else {
                continue;
            };
            taken.push(BBox::new(corner.0, corner.1, corner.0 + size.0, corner.1 + size.1));
            scene.loose.push(plate(&self.library, rng, text, corner, digit_height, PLATE_RATIO, self.variation(phase)));
        }
        scene
    }

    /// Height over width of scenes.
    fn aspect(&self) -> f64 {
        f64::from(self.picture.height) / f64::from(self.picture.width)
    }

    fn variation(&self, phase: &Phase) -> f64 {
        if self.augment() { phase.handwriting } else { 0.0 }
    }

    fn augment(&self) -> bool {
        self.library.split == Split::Train
    }

    /// The size a region of a scene is shown with when it is cropped from the picture.
    fn close_up(&self, region: BBox) -> Result<Size> {
        let square = u64::from(self.recipe.factor) * u64::from(self.recipe.factor);
        let [low, high] = self.recipe.crop_tokens;
        let pixels = |units: f64| (units * f64::from(self.picture.width)).round().max(1.0) as u32;
        smart_resize(
            Size::new(pixels(region.width()), pixels(region.height())),
            Budget::new(low * square, high * square, self.recipe.factor),
        )
    }

    /// A height (in units of the scene) that gives digits of the phase's size in a close-up, with their plate inside the region.
    fn digit_height(&self, rng: &mut ChaCha8Rng, phase: &Phase, region: BBox, size: Size, digits: usize) -> f64 {
        let [low, high] = phase.digit_pixels;
        // Every doubling is as likely as another.
        let pixels = between(rng, [low.ln(), high.ln()]).exp();
        let (w, h) = plate_size(digits, 1.0, PLATE_RATIO);
        (pixels * region.height() / f64::from(size.height)).min(0.9 * region.width() / w).min(0.9 * region.height() / h)
    }

    fn whole(&self, scene: &Scene) -> ShownView {
        self.shown(scene, scene.bounds(), self.view)
    }

    fn shown(&self, scene: &Scene, region: BBox, size: Size) -> ShownView {
        let frame = Frame { region, size };
        let rgb = draw_region(&self.library, scene, region, size);
        let bounds = size.bounds();
        let mut objects = Vec::new();
        for object in &scene.objects {
            // Less than a third of a thing is not the thing.
            let b = frame.pixels(object.bbox);
            if bounds.contains_fraction(&b) >= 0.34 {
                objects.push((object.name.clone(), b.clamp(&bounds)));
            }
        }
        for plate in scene.plates() {
            let b = frame.pixels(plate.bbox);
            if bounds.pad(1e-6).contains(&b) {
                let tall = frame.pixels(plate.bbox).height() / PLATE_RATIO;
                let label = if tall >= LEGIBLE { format!("{DIGIT}{}", plate.text) } else { PLATE.to_owned() };
                objects.push((label, b.clamp(&bounds)));
            }
        }
        ShownView { rgb, objects }
    }

    /// A box near `tight`, as far off as the phase wants.
    fn careless(&self, rng: &mut ChaCha8Rng, phase: &Phase, tight: BBox) -> [i64; 4] {
        let careless = phase.careless;
        let (w, h) = (tight.width() * between(rng, careless.scale), tight.height() * between(rng, careless.scale));
        let (cx, cy) = tight.center();
        let shift = [-careless.shift, careless.shift];
        let (cx, cy) = (cx + tight.width() * between(rng, shift), cy + tight.height() * between(rng, shift));
        self.snapped(BBox::new(cx - w / 2.0, cy - h / 2.0, cx + w / 2.0, cy + h / 2.0))
    }

    /// Multiples of `snap`, inside the view, sides over `min_side`.
    fn snapped(&self, b: BBox) -> [i64; 4] {
        self.snapped_to(b, i64::from(self.recipe.min_side / self.recipe.snap) + 1)
    }

    /// Multiples of `snap`, inside the view, sides of at least `steps` of them.
    fn snapped_to(&self, b: BBox, steps: i64) -> [i64; 4] {
        let snap = i64::from(self.recipe.snap);
        let shortest = steps * snap;
        let axis = |from: f64, to: f64, end: u32| {
            let end = i64::from(end) / snap * snap;
            let near = |v: f64| ((v / snap as f64).round() as i64 * snap).clamp(0, end);
            let (mut from, mut to) = (near(from), near(to));
            while to - from < shortest && (from > 0 || to < end) {
                // Grow on both sides in turn, where there is room.
                if to < end {
                    to += snap;
                }
                if to - from < shortest && from > 0 {
                    from -= snap;
                }
            }
            (from, to)
        };
        let (x1, x2) = axis(b.x1, b.x2, self.view.width);
        let (y1, y2) = axis(b.y1, b.y2, self.view.height);
        [x1, y1, x2, y2]
    }
}

/// Collects turns.
struct Writer {
    messages: Vec<Message>,
    views: Vec<ShownView>,
}

impl Writer {
    fn new(system: &str) -> Writer {
        let mut messages = Vec::new();
        if !system.is_empty() {
            messages.push(Message { role: Role::System, parts: vec![Part::Text(system.to_owned())] });
        }
        Writer { messages, views: Vec::new() }
    }

    fn ask_view(&mut self, before: &str, view: ShownView, question: String) {
        let mut parts = Vec::new();
        if !before.is_empty() {
            parts.push(Part::Text(before.to_owned()));
        }
        parts.push(Part::View(self.views.len()));
        parts.push(Part::Text(format!("{}{question}", words::AFTER_VIEW)));
        self.views.push(view);
        self.messages.push(Message { role: Role::User, parts });
    }

    fn say(&mut self, text: String) {
        self.messages.push(Message { role: Role::Assistant, parts: vec![Part::Text(text)] });
    }
}

fn is_object(label: &str) -> bool {
    label != PLATE && !label.starts_with(DIGIT)
}

fn between(rng: &mut ChaCha8Rng, [from, to]: [f64; 2]) -> f64 {
    rng.random_range(from..=to)
}

fn count(rng: &mut ChaCha8Rng, [from, to]: [usize; 2]) -> usize {
    rng.random_range(from..=to)
}

/// Writes `n` dialogues for people to look at: sheets of views twice enlarged (`sheet_0.png`, ...: green what is there,
/// red what the answer says) and their words (`dialogues.txt`).
///
/// # Errors
/// A folder that cannot be written.
pub fn dump(pretrain: &Pretrain, folder: &Path, seed: u64, step: u64, n: usize) -> Result<()> {
    ensure!(n > 0, "dumping dialogues: 0 were asked for, expected at least one");
    std::fs::create_dir_all(folder).with_context(|| format!("making the folder {}", folder.display()))?;
    const CELL: (u32, u32, u32, usize) = (580, 580, 3, 6);
    let (width, height, across, on_sheet) = CELL;
    let mut text = String::new();
    let mut views = Vec::new();
    for i in 0..n {
        let dialogue = pretrain.dialogue(seed, step, i as u64)?;
        let _ = writeln!(text, "== {i} {} (views from {})", dialogue.task, views.len());
        let mut said = Vec::new();
        for message in &dialogue.messages {
            let mut line = String::new();
            for part in &message.parts {
                match part {
                    Part::Text(t) => line += t,
                    Part::View(v) => {
                        let _ = write!(
                            line,
                            "<view {v}: {}x{}>",
                            dialogue.views[*v].rgb.width(),
                            dialogue.views[*v].rgb.height()
                        );
                    }
                }
            }
            let _ = writeln!(text, "{:?}: {line}", message.role);
            said.extend(answered_boxes(&line).into_iter().filter(|_| message.role == Role::Assistant));
        }
        for (k, view) in dialogue.views.iter().enumerate() {
            let mut rgb = ::image::imageops::resize(
                &view.rgb,
                view.rgb.width() * 2,
                view.rgb.height() * 2,
                ::image::imageops::FilterType::Nearest,
            );
            let twice = |b: &BBox| BBox::new(b.x1 * 2.0, b.y1 * 2.0, b.x2 * 2.0, b.y2 * 2.0);
            for (_, b) in &view.objects {
                crate::image::draw_box(&mut rgb, &twice(b), [0, 220, 0], 1);
            }
            for (_, b) in said.iter().filter(|(image, _)| *image == k) {
                crate::image::draw_box(&mut rgb, &twice(b), [255, 30, 30], 2);
            }
            views.push(rgb);
        }
    }
    for (k, on_this) in views.chunks(on_sheet).enumerate() {
        let mut sheet = RgbImage::new(width * across, height * on_sheet.div_ceil(across as usize) as u32);
        for (i, view) in on_this.iter().enumerate() {
            let (column, row) = (i as u32 % across, i as u32 / across);
            ::image::imageops::overlay(&mut sheet, view, i64::from(column * width), i64::from(row * height));
        }
        crate::image::save(&sheet, &folder.join(format!("sheet_{k}.png")))?;
    }
    let path = folder.join("dialogues.txt");
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

/// The boxes of an answer in words, as far as it is one of ours, each with its view's index.
fn answered_boxes(text: &str) -> Vec<(usize, BBox)> {
    let inner = text.trim_start_matches("```json").trim_end_matches("```");
    let list: Vec<serde_json::Value> = serde_json::from_str(inner).unwrap_or_default();
    let image = |row: &serde_json::Value| row["image"].as_u64().map_or(0, |k| k as usize - 1);
    list.iter().filter_map(|row| Some((image(row), serde_json::from_value(row["bbox_2d"].clone()).ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::world::tests::SMALL;

    fn pretrain(split: usize) -> Pretrain {
        Pretrain::new(SMALL[split].clone(), Recipe::default()).unwrap()
    }

    fn text(message: &Message) -> String {
        message.parts.iter().map(|p| if let Part::Text(t) = p { t.as_str() } else { "<view>" }).collect()
    }

    #[test]
    fn dialogues_repeat_and_keep_their_promises() {
        let pretrain = pretrain(0);
        assert_eq!(pretrain.view, Size::new(280, 196)); // 2016x1512 in at most 80 tokens of 28x28
        let mut seen = std::collections::BTreeMap::new();
        for i in 0..300 {
            let dialogue = pretrain.dialogue(5, 5000, i).unwrap();
            *seen.entry(dialogue.task).or_insert(0) += 1;
            if i % 50 == 0 {
                let again = pretrain.dialogue(5, 5000, i).unwrap();
                assert_eq!(again.messages, dialogue.messages);
                assert!(again.views.iter().zip(&dialogue.views).all(|(a, b)| a.rgb == b.rgb));
            }
            let (question, answer) = (text(&dialogue.messages[0]), text(&dialogue.messages[1]));
            assert!(question.starts_with("<view>\nQuestion: "), "{question}");
            assert!(!question.contains("plate under"));
            for (k, view) in dialogue.views.iter().enumerate() {
                let tokens = view.rgb.width() * view.rgb.height() / 784;
                assert!(view.rgb.width() % 28 == 0 && view.rgb.height() % 28 == 0);
                let scene = k == 0 && dialogue.task != "read";
                // Rounding to whole patches may leave a close-up one row above or below the budget's lower end.
                assert!(if scene { tokens == 70 } else { (42..=64).contains(&tokens) }, "{} {tokens}", dialogue.task);
                let bounds = BBox::new(0.0, 0.0, f64::from(view.rgb.width()), f64::from(view.rgb.height()));
                assert!(view.objects.iter().all(|(_, b)| bounds.contains(b)));
            }
            for (_, b) in answered_boxes(&answer) {
                assert!(pretrain.view.bounds().contains(&b) && b.width() > 28.0 && b.height() > 28.0, "{b}");
                assert!(<[f64; 4]>::from(b).iter().all(|v| v % 7.0 == 0.0));
            }
            match dialogue.task {
                "read" | "two_turns" => {
                    let last = dialogue.views.last().unwrap();
                    let plates: Vec<&str> = last
                        .objects
                        .iter()
                        .filter(|(label, _)| !is_object(label))
                        .map(|(label, _)| label.strip_prefix("digit:").unwrap_or(label))
                        .collect();
                    assert_eq!(plates.len(), 1, "{} {i}", dialogue.task);
                    assert_eq!(text(dialogue.messages.last().unwrap()), format!("\\boxed{{{}}}", plates[0]));
                }
                "locate" => assert_eq!(answered_boxes(&answer).len(), 1),
                "list" => {
                    let objects = dialogue.views[0].objects.iter().filter(|(label, _)| is_object(label)).count();
                    assert_eq!(answered_boxes(&answer).len(), objects);
                }
                _ => {
                    assert!(dialogue.views[0].objects.iter().any(|(label, _)| answer == format!("\\boxed{{{label}}}")))
                }
            }
            if dialogue.task == "two_turns" {
                assert_eq!(dialogue.messages.len(), 4);
                assert!(text(&dialogue.messages[2]).starts_with("Here is the enlarged area.\n<view>\nQuestion: "));
            }
        }
        assert_eq!(seen.len(), 5, "{seen:?}");
    }

    #[test]
    fn boxes_grow_to_the_shortest_side_inside_the_view() {
        let pretrain = pretrain(0);
        assert_eq!(pretrain.snapped(BBox::new(100.0, 50.0, 171.0, 121.0)), [98, 49, 168, 119]);
        assert_eq!(pretrain.snapped(BBox::new(270.0, -5.0, 300.0, 10.0)), [245, 0, 280, 35]);
    }

    /// Of this thread, so that a busy machine does not count.
    fn processor_seconds() -> f64 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call only writes the struct it is given.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
        time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
    }

    /// `LOOK=DIR cargo test --release --lib look_at_dialogues -- --ignored --nocapture` writes sheets and tells the pace.
    #[test]
    #[ignore = "writes pictures for people"]
    fn look_at_dialogues() {
        let out = std::path::PathBuf::from(std::env::var("LOOK").unwrap());
        let assets = crate::synth::assets_dir().unwrap();
        for (split, name) in [(Split::Train, "train"), (Split::Test, "test")] {
            let config = std::env::var("CONFIG").unwrap_or_else(|_| "configs/nano_pretrain.toml".into());
            let text = std::fs::read_to_string(config).unwrap();
            let plan: crate::sft::Plan = crate::config::parse(&text, &[]).unwrap();
            let pretrain = Pretrain::load(&assets, split, plan.data.pretrain.unwrap()).unwrap();
            for step in [0, 2000, 4000] {
                dump(&pretrain, &out.join(format!("{name}_{step}")), 3, step, 24).unwrap();
                let start = processor_seconds();
                for i in 0..200 {
                    pretrain.dialogue(1, step, i).unwrap();
                }
                eprintln!("{name} step {step}: {:.2} ms a dialogue", (processor_seconds() - start) * 1000.0 / 200.0);
            }
        }
    }
}
