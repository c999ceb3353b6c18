//! The bundled multi-image world: rows of two to four pictures that must be looked at together, with known truth.
//!
//! A row knows no pixels, like a [`Scene`]: its pictures are scenes, or regions of scenes. Six tasks, after those of MIG-Bench (spec
//! 3.4): the same object in another picture, what differs between two, the object named in words among several, the part of Image-1
//! found in Image-2, an object followed over a sequence, a question of two steps. It hides layout and chance. What must
//! stay true: the same library, options, seed and index give the same row; each question has one answer; the question never says
//! which picture the target is in where finding that out is the task (`group`).

use anyhow::{Result, ensure};
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom, index};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::library::Library;
use super::world::{Placed, Scene, background, free_place, object};
use super::{Split, pick, stream};
use crate::geometry::BBox;

const PURPOSE: u64 = 3;
/// Tries to lay out one picture before its objects are made a little smaller.
const TRIES: usize = 60;

/// What a row asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    SameObject,
    Difference,
    Group,
    Region,
    Tracking,
    Reasoning,
}

impl Kind {
    pub const ALL: [Kind; 6] =
        [Kind::SameObject, Kind::Difference, Kind::Group, Kind::Region, Kind::Tracking, Kind::Reasoning];

    pub fn name(self) -> &'static str {
        match self {
            Kind::SameObject => "same_object",
            Kind::Difference => "difference",
            Kind::Group => "group",
            Kind::Region => "region",
            Kind::Tracking => "tracking",
            Kind::Reasoning => "reasoning",
        }
    }
}

/// How the rows look. Lengths are in widths of the picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PairOptions {
    /// The tasks that rows are drawn for, in turn.
    pub tasks: Vec<Kind>,
    /// Objects in a picture, from and to.
    pub objects: [usize; 2],
    /// Longest side of an object, from and to.
    pub object_size: [f64; 2],
    /// Pictures of the group task, from and to.
    pub group: [usize; 2],
    /// Pictures of a sequence.
    pub sequence: usize,
    /// Share of rows about one object in which another of its kind is to be told apart.
    pub look_alikes: f64,
    /// Vary light, colour, shape, side and angle (training material only).
    pub augment: bool,
}

impl Default for PairOptions {
    fn default() -> PairOptions {
        PairOptions {
            tasks: Kind::ALL.to_vec(),
            objects: [3, 4],
            object_size: [0.2, 0.28],
            group: [2, 4],
            sequence: 3,
            look_alikes: 0.25,
            augment: true,
        }
    }
}

impl PairOptions {
    /// # Errors
    /// A value that no row can be drawn with, named.
    pub fn validate(&self) -> Result<()> {
        ensure!(
            !self.tasks.is_empty(),
            "tasks is empty, expected some of same_object, difference, group, region, tracking, reasoning"
        );
        let [from, to] = self.objects;
        ensure!(
            2 <= from && from <= to && to <= 8,
            "objects is [{from}, {to}], expected two rising numbers from 2 to 8"
        );
        let [from, to] = self.object_size;
        ensure!(
            0.02 <= from && from <= to && to <= 0.5,
            "object_size is [{from}, {to}], expected two rising shares of the width between 0.02 and 0.5"
        );
        let [from, to] = self.group;
        ensure!(2 <= from && from <= to && to <= 8, "group is [{from}, {to}], expected two rising numbers from 2 to 8");
        ensure!((2..=8).contains(&self.sequence), "sequence is {}, expected 2 to 8 pictures", self.sequence);
        ensure!(
            (0.0..=1.0).contains(&self.look_alikes),
            "look_alikes is {}, expected a share from 0 to 1",
            self.look_alikes
        );
        Ok(())
    }
}

/// One picture of a row: a region of a scene.
#[derive(Clone, Debug, PartialEq)]
pub struct Shot {
    pub scene: Scene,
    /// In scene units, of the scene's aspect.
    pub region: BBox,
}

impl Shot {
    fn whole(scene: Scene) -> Shot {
        Shot { region: scene.bounds(), scene }
    }
}

/// A place in one of the pictures.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Counted from 1.
    pub image: usize,
    /// In units of that picture's scene.
    pub bbox: BBox,
    pub label: String,
}

/// A question over several pictures.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub kind: Kind,
    pub shots: Vec<Shot>,
    pub question: String,
    pub targets: Vec<Place>,
    /// What is known between the pictures, for building trajectories.
    pub relations: Vec<Value>,
}

/// Draws rows by number.
#[derive(Clone, Debug)]
pub struct Pairs {
    pub library: Library,
    pub options: PairOptions,
    pub aspect: f64,
}

impl Pairs {
    /// # Errors
    /// Options out of range.
    pub fn new(library: Library, options: PairOptions, aspect: f64) -> Result<Pairs> {
        options.validate()?;
        ensure!(
            options.objects[1] * options.group[1] <= library.classes.len(),
            "objects = {} in each of group = {} pictures are more than the {} kinds of objects there are",
            options.objects[1],
            options.group[1],
            library.classes.len()
        );
        Ok(Pairs { library, options, aspect })
    }

    /// Row `index` of `seed`.
    ///
    /// # Errors
    /// The objects do not fit: too many or too large for the picture.
    pub fn row(&self, seed: u64, index: u64) -> Result<Row> {
        let mut rng = stream(seed, PURPOSE + 16 * self.library.split as u64, index);
        let kind = self.options.tasks[index as usize % self.options.tasks.len()];
        match kind {
            Kind::SameObject => self.same_object(&mut rng),
            Kind::Difference => self.difference(&mut rng),
            Kind::Group => self.group(&mut rng),
            Kind::Region => self.region(&mut rng),
            Kind::Tracking => self.tracking(&mut rng),
            Kind::Reasoning => self.reasoning(&mut rng),
        }
    }

    fn augment(&self) -> bool {
        self.options.augment && self.library.split == Split::Train
    }

    fn count(&self, rng: &mut ChaCha8Rng) -> usize {
        rng.random_range(self.options.objects[0]..=self.options.objects[1])
    }

    /// So many different kinds of objects, none of `but`.
    fn kinds(&self, rng: &mut ChaCha8Rng, count: usize, but: &[usize]) -> Vec<usize> {
        let all = index::sample(rng, self.library.classes.len(), self.library.classes.len());
        all.into_iter().filter(|class| !but.contains(class)).take(count).collect()
    }

    /// An object of some kind, of a size of its own, nowhere yet.
    fn thing(&self, rng: &mut ChaCha8Rng, class: usize) -> Placed {
        let [from, to] = self.options.object_size;
        let longest = rng.random_range(from..=to);
        object(&self.library, rng, class, longest, self.augment())
    }

    /// A photograph with these objects somewhere on it, none over another.
    fn scatter(&self, rng: &mut ChaCha8Rng, things: &[Placed]) -> Result<Scene> {
        let mut scene = background(&self.library, rng, self.aspect, self.augment());
        scene.objects = self.lay_out(rng, things, &[])?;
        Ok(scene)
    }

    /// Places for these objects, away from each other and from `taken`.
    fn lay_out(&self, rng: &mut ChaCha8Rng, things: &[Placed], taken: &[BBox]) -> Result<Vec<Placed>> {
        let mut shrink = 1.0;
        for round in 0..TRIES * 8 {
            if round > 0 && round % TRIES == 0 {
                shrink *= 0.93;
            }
            let mut taken = taken.to_vec();
            let mut placed = Vec::with_capacity(things.len());
            for thing in things {
                let (w, h) = (thing.bbox.width() * shrink, thing.bbox.height() * shrink);
                let Some((x, y)) = free_place(rng, &taken, (w, h), self.aspect, 0.02) else { break };
                let bbox = BBox::new(x, y, x + w, y + h);
                taken.push(bbox);
                placed.push(Placed { bbox, ..thing.clone() });
            }
            if placed.len() == things.len() {
                return Ok(placed);
            }
        }
        anyhow::bail!(
            "laying out {} objects of {:?} widths in a picture of aspect {:.2} failed; ask for fewer or smaller ones",
            things.len(),
            self.options.object_size,
            self.aspect
        )
    }

    /// A close look at an object: its box with some of what is around it, of the scene's aspect, inside the scene.
    fn close_up(&self, rng: &mut ChaCha8Rng, scene: &Scene, around: BBox) -> BBox {
        let margin = rng.random_range(1.15..=1.5);
        let width = (around.width().max(around.height() / self.aspect) * margin).min(1.0);
        let height = width * self.aspect;
        let (cx, cy) = around.center();
        let x = (cx - width / 2.0).clamp(0.0, 1.0 - width);
        let y = (cy - height / 2.0).clamp(0.0, (scene.aspect - height).max(0.0));
        BBox::new(x, y, x + width, y + height)
    }

    /// Image-1 shows an object closely; it is one of several in Image-2, in another light, size and side.
    fn same_object(&self, rng: &mut ChaCha8Rng) -> Result<Row> {
        let count = self.count(rng);
        let classes = self.kinds(rng, count, &[]);
        let shown = self.thing(rng, classes[0]);
        let reference = self.scatter(rng, std::slice::from_ref(&shown))?;
        let look_alike = rng.random_bool(self.options.look_alikes);
        let mut things: Vec<Placed> = classes.iter().map(|&class| self.thing(rng, class)).collect();
        things[0].picture = shown.picture;
        if look_alike && let Some(other) = self.another_picture(rng, &shown) {
            things.push(other);
        }
        let again = self.again(rng, &shown);
        things[0] = again;
        let scene = self.scatter(rng, &things)?;
        let region = self.close_up(rng, &reference, reference.objects[0].bbox);
        let target = scene.objects[0].bbox;
        let name = shown.name.clone();
        Ok(Row {
            kind: Kind::SameObject,
            question: pick(rng, &words::SAME_OBJECT).to_owned(),
            targets: vec![Place { image: 2, bbox: target, label: name.clone() }],
            relations: vec![json!({"relation": "same_object", "reference": 1, "target": 2, "name": name})],
            shots: vec![Shot { scene: reference, region }, Shot::whole(scene)],
        })
    }

    /// The same picture of the same thing, seen otherwise.
    fn again(&self, rng: &mut ChaCha8Rng, thing: &Placed) -> Placed {
        let other = self.thing(rng, thing.class);
        let (w, h) = (thing.bbox.width(), thing.bbox.height());
        let scale = other.bbox.width().max(other.bbox.height()) / w.max(h);
        Placed { picture: thing.picture, bbox: BBox::new(0.0, 0.0, w * scale, h * scale), ..other }
    }

    /// Another thing of its kind, if there is a picture of one.
    fn another_picture(&self, rng: &mut ChaCha8Rng, thing: &Placed) -> Option<Placed> {
        let pictures = self.library.classes[thing.class].pictures.len();
        let others: Vec<usize> = (0..pictures).filter(|p| *p != thing.picture).collect();
        let picture = *others.choose(rng)?;
        let full = self.library.classes[thing.class].pictures[picture].full();
        let other = self.thing(rng, thing.class);
        let longest = other.bbox.width().max(other.bbox.height());
        let scale = longest / full.width.max(full.height) as f64;
        let bbox = BBox::new(0.0, 0.0, full.width as f64 * scale, full.height as f64 * scale);
        Some(Placed { picture, bbox, ..other })
    }

    /// Two views of one scene; something was added, removed, moved or swapped.
    fn difference(&self, rng: &mut ChaCha8Rng) -> Result<Row> {
        let count = self.count(rng).max(3);
        let classes = self.kinds(rng, count + 1, &[]);
        let things: Vec<Placed> = classes[..count].iter().map(|&class| self.thing(rng, class)).collect();
        let before = self.scatter(rng, &things)?;
        let mut after = before.clone();
        let changed = rng.random_range(0..count);
        let boxes: Vec<BBox> = before.objects.iter().map(|o| o.bbox).collect();
        let was = before.objects[changed].clone();
        let change = ["added", "removed", "moved", "swapped"][rng.random_range(0..4)];
        let (place, fact) = match change {
            "moved" => {
                // To a place of its own: neither over another nor over where it stood.
                let moved = self.lay_out(rng, std::slice::from_ref(&was), &boxes)?.remove(0);
                after.objects[changed] = moved.clone();
                (Place { image: 2, bbox: moved.bbox, label: was.name.clone() }, json!({"name": was.name}))
            }
            "swapped" => {
                let mut new = self.thing(rng, classes[count]);
                new.bbox = fitted(new.bbox, was.bbox);
                after.objects[changed] = new.clone();
                let fact = json!({"name": new.name, "was": was.name});
                (Place { image: 2, bbox: new.bbox, label: new.name }, fact)
            }
            "added" => {
                // What is there in the second picture was not in the first.
                let mut first = before.clone();
                first.objects.remove(changed);
                let row = (Place { image: 2, bbox: was.bbox, label: was.name.clone() }, json!({"name": was.name}));
                return Ok(self.differ(rng, change, first, after, row));
            }
            _ => {
                after.objects.remove(changed);
                (Place { image: 1, bbox: was.bbox, label: was.name.clone() }, json!({"name": was.name}))
            }
        };
        Ok(self.differ(rng, change, before, after, (place, fact)))
    }

    fn differ(&self, rng: &mut ChaCha8Rng, change: &str, first: Scene, second: Scene, found: (Place, Value)) -> Row {
        let (place, mut fact) = found;
        fact["relation"] = "difference".into();
        fact["change"] = change.into();
        Row {
            kind: Kind::Difference,
            question: pick(rng, &words::DIFFERENCE).to_owned(),
            targets: vec![place],
            relations: vec![fact],
            shots: vec![Shot::whole(first), Shot::whole(second)],
        }
    }

    /// An object named in words is in one of several pictures.
    fn group(&self, rng: &mut ChaCha8Rng) -> Result<Row> {
        let pictures = rng.random_range(self.options.group[0]..=self.options.group[1]);
        let mut used: Vec<usize> = Vec::new();
        let mut shots = Vec::with_capacity(pictures);
        for _ in 0..pictures {
            let count = self.count(rng);
            let classes = self.kinds(rng, count, &used);
            used.extend(&classes);
            let things: Vec<Placed> = classes.iter().map(|&class| self.thing(rng, class)).collect();
            shots.push(Shot::whole(self.scatter(rng, &things)?));
        }
        let k = rng.random_range(0..pictures);
        let objects = &shots[k].scene.objects;
        let object = &objects[rng.random_range(0..objects.len())];
        let place = Place { image: k + 1, bbox: object.bbox, label: object.name.clone() };
        Ok(Row {
            kind: Kind::Group,
            question: pick(rng, &words::GROUP).replace("{X}", &object.name),
            relations: vec![json!({"relation": "only_in", "name": object.name, "target": k + 1})],
            targets: vec![place],
            shots,
        })
    }

    /// Image-1 is a part of what Image-2 shows whole.
    fn region(&self, rng: &mut ChaCha8Rng) -> Result<Row> {
        let count = self.count(rng);
        let classes = self.kinds(rng, count, &[]);
        let things: Vec<Placed> = classes.iter().map(|&class| self.thing(rng, class)).collect();
        let scene = self.scatter(rng, &things)?;
        let object = &scene.objects[rng.random_range(0..scene.objects.len())];
        let region = self.close_up(rng, &scene, object.bbox);
        Ok(Row {
            kind: Kind::Region,
            question: pick(rng, &words::REGION).to_owned(),
            relations: vec![json!({"relation": "part_of", "reference": 1, "target": 2, "name": object.name})],
            targets: vec![Place { image: 2, bbox: region, label: "Image-1".into() }],
            shots: vec![Shot { scene: scene.clone(), region }, Shot::whole(scene)],
        })
    }

    /// The objects of Image-1 move from picture to picture.
    fn tracking(&self, rng: &mut ChaCha8Rng) -> Result<Row> {
        let count = self.count(rng);
        let classes = self.kinds(rng, count, &[]);
        let mut things: Vec<Placed> = classes.iter().map(|&class| self.thing(rng, class)).collect();
        if rng.random_bool(self.options.look_alikes)
            && let Some(other) = self.another_picture(rng, &things[0].clone())
        {
            things.push(other);
        }
        let first = self.scatter(rng, &things)?;
        let mut shots = vec![Shot::whole(first.clone())];
        for _ in 1..self.options.sequence {
            let mut next = first.clone();
            let last = &shots[shots.len() - 1].scene;
            next.objects = self.wander(rng, &last.objects);
            shots.push(Shot::whole(next));
        }
        let which = rng.random_range(0..count);
        let image = shots.len();
        let object = &shots[image - 1].scene.objects[which];
        let alike = first.objects.iter().filter(|o| o.class == object.class).count() > 1;
        // Two of a kind are told apart by where they stood first.
        let rest = first.objects.iter().enumerate().filter(|(i, o)| *i != which && o.class == object.class);
        let side = rest.map(|(_, o)| o.bbox.center().0).next();
        let left = side.is_some_and(|other| first.objects[which].bbox.center().0 < other);
        let named = match (alike, left) {
            (false, _) => object.name.clone(),
            (true, true) => format!("left {}", object.name),
            (true, false) => format!("right {}", object.name),
        };
        let place = Place { image, bbox: object.bbox, label: object.name.clone() };
        Ok(Row {
            kind: Kind::Tracking,
            question: pick(rng, &words::TRACKING).replace("{X}", &named).replace("{K}", &image.to_string()),
            relations: vec![json!({"relation": "follows", "reference": 1, "target": image, "name": named})],
            targets: vec![place],
            shots,
        })
    }

    /// Each object a little further, in a direction of its own; one that would meet another or the edge stays.
    fn wander(&self, rng: &mut ChaCha8Rng, objects: &[Placed]) -> Vec<Placed> {
        let mut moved = objects.to_vec();
        for i in 0..moved.len() {
            let b = moved[i].bbox;
            for _ in 0..12 {
                let angle = rng.random_range(0.0..std::f64::consts::TAU);
                let (dx, dy) = (0.12 * angle.cos(), 0.12 * angle.sin());
                let to = BBox::new(b.x1 + dx, b.y1 + dy, b.x2 + dx, b.y2 + dy);
                let inside = BBox::new(0.01, 0.01, 0.99, self.aspect - 0.01).contains(&to);
                let free = moved.iter().enumerate().all(|(j, o)| j == i || o.bbox.intersection(&to).is_none());
                if inside && free {
                    moved[i].bbox = to;
                    break;
                }
            }
        }
        moved
    }

    /// Which object Image-1 means is found out from its place there; then it is looked for in Image-2.
    fn reasoning(&self, rng: &mut ChaCha8Rng) -> Result<Row> {
        let count = self.count(rng).max(3);
        let mut classes = self.kinds(rng, count, &[]);
        let things: Vec<Placed> = classes.iter().map(|&class| self.thing(rng, class)).collect();
        let first = self.scatter(rng, &things)?;
        classes.shuffle(rng);
        let things: Vec<Placed> = classes.iter().map(|&class| self.thing(rng, class)).collect();
        let second = self.scatter(rng, &things)?;
        let (x, y) = (|o: &Placed| o.bbox.center().0, |o: &Placed| o.bbox.center().1);
        let (end, words) = [
            (first.objects.iter().min_by(|a, b| x(a).total_cmp(&x(b))), "furthest to the left"),
            (first.objects.iter().max_by(|a, b| x(a).total_cmp(&x(b))), "furthest to the right"),
            (first.objects.iter().min_by(|a, b| y(a).total_cmp(&y(b))), "highest"),
            (first.objects.iter().max_by(|a, b| y(a).total_cmp(&y(b))), "lowest"),
        ][rng.random_range(0..4)];
        let Some(chosen) = end else { anyhow::bail!("a picture without objects") };
        let Some(found) = second.objects.iter().find(|o| o.class == chosen.class) else {
            anyhow::bail!("the second picture lacks the {}", chosen.name)
        };
        Ok(Row {
            kind: Kind::Reasoning,
            question: pick(rng, &words::REASONING).replace("{X}", words),
            relations: vec![
                json!({"relation": "place", "reference": 1, "name": chosen.name, "is": words}),
                json!({"relation": "same_kind", "reference": 1, "target": 2, "name": chosen.name}),
            ],
            targets: vec![Place { image: 2, bbox: found.bbox, label: found.name.clone() }],
            shots: vec![Shot::whole(first.clone()), Shot::whole(second)],
        })
    }
}

/// `b` as large as fits into `place`, in its middle.
pub(super) fn fitted(b: BBox, place: BBox) -> BBox {
    let scale = (place.width() / b.width()).min(place.height() / b.height());
    let (w, h) = (b.width() * scale, b.height() * scale);
    let (cx, cy) = place.center();
    BBox::new(cx - w / 2.0, cy - h / 2.0, cx + w / 2.0, cy + h / 2.0)
}

/// How the questions are worded.
mod words {
    pub const SAME_OBJECT: [&str; 3] = [
        "Find the object of Image-1 in Image-2.",
        "Where is the object of Image-1 in Image-2?",
        "Image-2 shows the object of Image-1 once more. Where?",
    ];
    pub const DIFFERENCE: [&str; 3] = [
        "What is different between Image-1 and Image-2?",
        "Find the difference between Image-1 and Image-2.",
        "One object differs between Image-1 and Image-2. Where is it?",
    ];
    pub const GROUP: [&str; 3] =
        ["Find the {X} in one of the images.", "Which image shows the {X}, and where?", "Where is the {X}?"];
    pub const REGION: [&str; 3] = [
        "Find the area that Image-1 shows in Image-2.",
        "Image-1 is a part of Image-2. Which?",
        "Which area of Image-2 is shown in Image-1?",
    ];
    pub const TRACKING: [&str; 2] =
        ["Where is the {X} of Image-1 in Image-{K}?", "Follow the {X} of Image-1. Where is it in Image-{K}?"];
    pub const REASONING: [&str; 2] = [
        "Take the object that is {X} in Image-1. Where is it in Image-2?",
        "Which object is {X} in Image-1? Find it in Image-2.",
    ];
}

#[cfg(test)]
mod tests {
    use super::super::world::tests::SMALL;
    use super::*;

    fn pairs(split: usize) -> Pairs {
        Pairs::new(SMALL[split].clone(), PairOptions { group: [2, 3], ..Default::default() }, 0.75).unwrap()
    }

    #[test]
    fn rows_repeat_and_targets_lie_in_their_pictures() {
        for split in [0, 1] {
            let pairs = pairs(split);
            for i in 0..120 {
                let row = pairs.row(5, i).unwrap();
                assert_eq!(row, pairs.row(5, i).unwrap());
                assert_eq!(row.kind, Kind::ALL[i as usize % 6]);
                assert!((2..=4).contains(&row.shots.len()) && row.targets.len() == 1 && !row.relations.is_empty());
                let target = &row.targets[0];
                let shot = &row.shots[target.image - 1];
                // Up to rounding of sums of lengths.
                assert!(shot.region.pad(1e-9).contains(&target.bbox), "{row:?}");
                for shot in &row.shots {
                    let aspect = shot.region.height() / shot.region.width();
                    assert!((aspect - 0.75).abs() < 1e-9 && shot.scene.bounds().pad(1e-9).contains(&shot.region));
                    for (k, a) in shot.scene.objects.iter().enumerate() {
                        assert!(shot.scene.objects[..k].iter().all(|b| a.bbox.intersection(&b.bbox).is_none()));
                    }
                }
                assert!(!row.question.contains('{'), "{}", row.question);
            }
        }
    }

    /// The object that a row is about, as its facts say, is where its target says.
    #[test]
    fn each_question_has_one_answer() {
        let pairs = pairs(0);
        for i in 0..300 {
            let row = pairs.row(6, i).unwrap();
            let target = &row.targets[0];
            let objects = |k: usize| &row.shots[k - 1].scene.objects;
            let at_target: Vec<&Placed> = objects(target.image).iter().filter(|o| o.bbox == target.bbox).collect();
            match row.kind {
                Kind::Region => assert!(at_target.is_empty() && row.shots[0].region == target.bbox),
                Kind::Group => {
                    let all = row.shots.iter().flat_map(|s| &s.scene.objects);
                    assert_eq!(all.filter(|o| o.name == target.label).count(), 1);
                    assert_eq!(at_target[0].name, target.label);
                }
                Kind::SameObject => {
                    let shown = &objects(1)[0];
                    let same = |o: &&Placed| o.class == shown.class && o.picture == shown.picture;
                    assert_eq!(objects(2).iter().filter(same).collect::<Vec<_>>(), at_target);
                }
                Kind::Difference => {
                    let other = objects(3 - target.image);
                    assert!(other.iter().all(|o| o != at_target[0]));
                    let kept = objects(target.image).iter().filter(|o| other.contains(o)).count();
                    assert_eq!(kept + 1, objects(target.image).len(), "one thing differs");
                }
                Kind::Tracking | Kind::Reasoning => assert_eq!(at_target.len(), 1),
            }
        }
    }

    #[test]
    fn impossible_options_are_refused_by_name() {
        let bad = |options: PairOptions| options.validate().unwrap_err().to_string();
        assert!(bad(PairOptions { tasks: vec![], ..Default::default() }).contains("tasks is empty"));
        assert!(bad(PairOptions { sequence: 1, ..Default::default() }).contains("sequence is 1"));
        let many = PairOptions { objects: [8, 8], group: [8, 8], ..Default::default() };
        assert!(Pairs::new(SMALL[0].clone(), many, 0.75).unwrap_err().to_string().contains("kinds of objects"));
    }
}
