package main

import (
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/cedarpost/cedarpost/logformat"
)

type entitiesCmd struct {
	Import  importCmd        `cmd:"" help:"Create or replace entities from a file."`
	Get     getEntityCmd     `cmd:"" help:"Print one entity."`
	Put     putEntityCmd     `cmd:"" help:"Create or replace one entity."`
	Set     setEntityCmd     `cmd:"" help:"Set and remove attributes of an entity."`
	Move    moveEntityCmd    `cmd:"" help:"Change which groups an entity is in."`
	Delete  deleteEntityCmd  `cmd:"" help:"Delete entities."`
	List    listEntitiesCmd  `cmd:"" help:"List entities by type and id."`
	History entityHistoryCmd `cmd:"" help:"List which entities changed, when, and by which caller, newest first."`
}

// afterFlag continues a list.
type afterFlag struct {
	After string `help:"Go on where a list ended: the token that it printed, with the same filters." placeholder:"TOKEN"`
}

const maxPage = 1000

// pageOf returns the size of the next page, when seen entries of limit are done.
func pageOf(limit, seen int) int32 {
	if limit == 0 {
		return maxPage
	}
	return int32(min(limit-seen, maxPage))
}

// structText returns a record as JSON, "" if it is empty.
func structText(s *structpb.Struct) string {
	if len(s.GetFields()) == 0 {
		return ""
	}
	text, err := logformat.JSON(s)
	if err != nil {
		return err.Error()
	}
	return text
}
