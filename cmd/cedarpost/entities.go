package main

import (
	"google.golang.org/protobuf/types/known/structpb"
)

type entitiesCmd struct {
	Import  importCmd        `cmd:"" help:"Put entities from a file."`
	Get     getEntityCmd     `cmd:"" help:"Read one entity."`
	List    listEntitiesCmd  `cmd:"" help:"List entities by type and id."`
	History entityHistoryCmd `cmd:"" help:"List who changed which entity when, newest first."`
}

const maxPage = 1000

// pageOf is the size of the next page, when so many were seen of a limit.
func pageOf(limit, seen int) int32 {
	if limit == 0 {
		return maxPage
	}
	return int32(min(limit-seen, maxPage))
}

// structText is a record as JSON, "" if it is empty.
func structText(s *structpb.Struct) string {
	if len(s.GetFields()) == 0 {
		return ""
	}
	text, err := protoText(s)
	if err != nil {
		return err.Error()
	}
	return text
}
