cmake_minimum_required(VERSION 3.25)

# Writes HEADER with the commit of the sources in SOURCE; run by every build, so that a commit made since the configuration is named. An
# unchanged header is left alone, and nothing is compiled again.
execute_process(COMMAND git -C ${SOURCE} describe --always --dirty OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT commit)
  set(commit "unknown")
endif()
file(CONFIGURE OUTPUT ${HEADER} CONTENT "#define KAVA_COMMIT \"@commit@\"\n" @ONLY)
