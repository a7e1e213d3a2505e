package engine

import (
	"errors"

	"github.com/cedar-policy/cedar-go"
)

// Loader brings entities that the pool of a question lacks, with all their stored
// ancestors, and adds them to the pool with [Pool.Add] or [Pool.Put]. The entities that
// are not stored are added too, as absent: each entity that is asked for must be known
// afterwards. It is called once for each level of dereference. If its error is
// [ErrTooLarge], it is called again for each question alone.
type Loader func(missing []cedar.EntityUID) error

// Evaluation is one question that was read, with the entities that it can touch. It is
// the only way to a decision: [Set.Prepare] and [Set.PrepareBatch] make it.
type Evaluation struct {
	// Question is nil if Err says why it was refused.
	Question *Question
	Slice    *Slice
	// Err is a *[RequestError] or wraps [ErrTooLarge], about this question alone.
	Err error

	set *Set
}

// Prepare reads one question and loads what it can touch. The error is a
// *[RequestError] if the question is wrong, wraps [ErrTooLarge], or else is as that of [Set.PrepareBatch].
func (s *Set) Prepare(ask Ask, pool *Pool, load Loader) (*Evaluation, error) {
	list, err := s.PrepareBatch([]Ask{ask}, pool, load)
	if err != nil {
		return nil, err
	}
	return &list[0], list[0].Err
}

// PrepareBatch reads questions that are decided at one revision, and loads what all of
// them can touch, together. It returns one evaluation for each question, in order. The
// error is that of load or of the [Pause], and concerns all questions.
func (s *Set) PrepareBatch(asks []Ask, pool *Pool, load Loader) ([]Evaluation, error) {
	list := make([]Evaluation, len(asks))
	for i, ask := range asks {
		e := &list[i]
		e.set = s
		if err := pool.look(""); err != nil {
			return nil, err
		}
		if e.Question, e.Err = s.read(ask); e.Err == nil {
			e.Slice = s.newSlice(e.Question, pool)
		}
	}
	for {
		missing, err := missingFrom(list, pool)
		if err != nil {
			return nil, err
		}
		if len(missing) == 0 {
			return list, nil
		}
		err = load(missing)
		switch {
		case errors.Is(err, ErrTooLarge) && len(list) == 1:
			list[0].refuse(err)
		case errors.Is(err, ErrTooLarge):
			return list, loadEach(list, pool, load)
		case err != nil:
			return nil, err
		}
	}
}

// loadEach completes one slice after another. A question that is too large gets its own error,
// and the others are decided.
func loadEach(list []Evaluation, pool *Pool, load Loader) error {
	for i := range list {
		one := list[i : i+1]
		for {
			missing, err := missingFrom(one, pool)
			if err != nil {
				return err
			}
			if len(missing) == 0 {
				break
			}
			if err := load(missing); errors.Is(err, ErrTooLarge) {
				one[0].refuse(err)
			} else if err != nil {
				return err
			}
		}
	}
	return nil
}

// refuse ends a question with an error about it alone.
func (e *Evaluation) refuse(err error) { e.Question, e.Slice, e.Err = nil, nil, err }

// missingFrom lists the entities that the slices lack, each once.
func missingFrom(list []Evaluation, pool *Pool) ([]cedar.EntityUID, error) {
	var missing []cedar.EntityUID
	listed := map[cedar.EntityUID]bool{}
	for i := range list {
		if list[i].Slice == nil {
			continue
		}
		if err := pool.look(list[i].Question.Bundle()); err != nil {
			return nil, err
		}
		found := list[i].Slice.toLoad()
		if err := list[i].Slice.err; err != nil {
			list[i].refuse(err)
			continue
		}
		if len(list) == 1 {
			return found, nil
		}
		for _, uid := range found {
			if !listed[uid] {
				listed[uid] = true
				missing = append(missing, uid)
			}
		}
	}
	return missing, nil
}

// Decide makes the three checks of the question. The error is Err, a *[RequestError]
// about an entity that came with the question, that of the [Pause], or wraps
// [ErrTooManyAncestors] or [ErrTooCostly].
func (e *Evaluation) Decide() (*Result, error) {
	if e.Err != nil {
		return nil, e.Err
	}
	return e.set.decide(e.Question, e.Slice)
}

// Explain says why the question was decided as it was: res is what Decide returned. It
// looks at every policy of the action, also those that the index passes over, and
// evaluates condition by condition; it takes no part in the decision. It has a budget of
// its own, and says so if that ends before every policy is explained. The error is that of
// the [Pause].
func (e *Evaluation) Explain(res *Result) (*Explanation, error) {
	return e.set.explain(e.Question, e.Slice, res)
}
